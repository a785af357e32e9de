"""Modules are read before they are imported, by a process that ends by itself."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qplug.machine import read_ahead as ahead
from qplug.machine import read_files
from qplug.machine.read_ahead import read_ahead

TAG = sys.implementation.cache_tag


@pytest.fixture(autouse=True)
def nothing_started() -> Iterator[None]:
    ahead._start.cache_clear()
    yield
    ahead._start.cache_clear()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with modules, compiled or not, in itself and in folders."""
    for name in ("a.py", "b.so", "notes.txt", "inner/c.py", "inner/deep/d.py", "tests/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    for name in ("a", "inner/c"):
        folder = (tmp_path / name).parent / "__pycache__"
        folder.mkdir(exist_ok=True)
        (folder / f"{Path(name).name}.{TAG}.pyc").write_text("compiled")
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were opened, or should have been."""
    files: list[Path] = []
    open_file = Path.open

    def remember(path: Path, *args: Any, **kwargs: Any) -> Any:
        files.append(path)
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", remember)
    return files


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("flat", {f"__pycache__/a.{TAG}.pyc", "b.so"}),
        (
            "tree",
            {
                f"__pycache__/a.{TAG}.pyc",
                "b.so",
                f"inner/__pycache__/c.{TAG}.pyc",
                f"inner/deep/__pycache__/d.{TAG}.pyc",  # it is missing, and is no error
            },
        ),
        ("text", {"a.py", "b.so", "inner/c.py", "inner/deep/d.py"}),
    ],
)
def test_each_module_of_a_folder_is_read_once(
    kind: str, expected: set[str], package: Path, opened: list[Path]
) -> None:
    read_files.Readers([(kind, str(package)), (kind, str(package / "no such folder"))]).run()
    assert {path.relative_to(package).as_posix() for path in opened} == expected
    assert len(opened) == len(expected)


def test_a_folder_that_is_at_hand_is_left_alone(
    package: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_files, "_AT_HAND", 10.0)
    read_files.main([f"text={package}", f"text={package / 'inner'}"])
    assert [path.name for path in opened] == ["a.py"]
    monkeypatch.setattr(read_files, "_AT_HAND", 0.0)
    read_files.main([f"text={package}"])
    assert {path.name for path in opened} == {"a.py", "b.so", "c.py", "d.py"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of the processes that were started, which do nothing."""
    words: list[list[str]] = []
    popen = subprocess.Popen

    def nothing(given: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        words.append(given)
        return popen([sys.executable, "-I", "-S", "-c", ""], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", nothing)
    return words


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_what_is_imported_is_not_read(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", ahead)
    read_ahead("torch", "models")  # the tests have torch
    assert not started
    without(monkeypatch, "transformers.modeling_utils")
    read_ahead("torch", "models")
    read_ahead("models")
    assert len(started) == 1
    folders = [word.partition("=")[2] for word in started[0][4:]]
    assert folders
    assert all(Path(folder).is_dir() for folder in folders)


def test_one_process_of_a_machine_reads(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "transformers.modeling_utils")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    read_ahead("models")
    assert not started


def test_a_machine_that_starts_no_process_imports_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError

    without(monkeypatch, "transformers.modeling_utils")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    read_ahead("models")


def test_the_process_reads_and_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "transformers.modeling_utils")
    before = {*threading.enumerate()}  # runs of other tests may still read
    read_ahead("models")
    waiting = next(
        t for t in threading.enumerate() if t.name == "qplug-read-ahead" and t not in before
    )
    began = time.monotonic()
    waiting.join(60)
    assert not waiting.is_alive(), f"still reads after {time.monotonic() - began:.0f} s"


def test_the_program_needs_neither_qplug_nor_packages() -> None:
    code = f"import runpy, sys; runpy.run_path({read_files.__file__!r}); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"qplug", "torch", "site"} & {*done.stdout.split()}
