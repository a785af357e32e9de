"""Only a regular file of a limited size is read, and no link out of its folder is followed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qplug.errors import QplugError
from qplug.files.regular import read_bytes, read_text


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    assert read_bytes(tmp_path / "file", 4, within=tmp_path) == b"1234"


def test_a_file_that_is_too_long(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(QplugError, match="is longer than 1 MiB"):
        read_bytes(tmp_path / "file", 1 << 20)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # an absolute path may be too long for a socket


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "a folder"),
        (os.mkfifo, "a named pipe"),
        (_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_what_is_no_regular_file(
    make: Callable[[Path], object], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "file")
    with pytest.raises(QplugError, match=f"/file: cannot be read: it is {kind}$"):
        read_bytes(tmp_path / "file", 4)


def test_a_link_out_of_the_folder_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/file").symlink_to("/dev/zero")
    with pytest.raises(QplugError, match="is a link out of its folder"):
        read_bytes(tmp_path / "model/file", 4, within=tmp_path / "model")


def test_the_cache_of_the_hub_is_within(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "snapshots/1", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_bytes(b"1234")
    (folder / "file").symlink_to("../../blobs/abc")
    assert read_bytes(folder / "file", 4, within=folder) == b"1234"


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "loop", "missing/file"])
def test_a_path_that_leads_nowhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((QplugError, FileNotFoundError)):
        read_bytes(tmp_path / name, 4)
    with pytest.raises((QplugError, FileNotFoundError)):
        read_bytes(tmp_path / name, 4, within=tmp_path)


def test_a_text_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"ab\xff")
    with pytest.raises(QplugError, match="not UTF-8, at byte 2: save it as UTF-8"):
        read_text(tmp_path / "file", 4)
