"""Opens a file only if it is a regular one: a pipe never hangs, and a device never fills memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from qplug.errors import QplugError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path, *, within: Path | None = None) -> BinaryIO:
    """Returns the open file at ``path``, and has read no byte of it.

    Raises FileNotFoundError if there is no such file. Raises QplugError if it is not a regular
    file, if it cannot be opened, or if it is a link to outside the folder ``within``.
    """
    if within is not None:
        refuse_link_out(path, within)
    try:
        _refuse_other_kinds(path, path.stat().st_mode)  # opening some devices has effects
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    file = os.fdopen(descriptor, "rb")
    try:
        _refuse_other_kinds(path, os.fstat(descriptor).st_mode)
    except QplugError:  # another file took the place of the first
        file.close()
        raise
    return file


def read_bytes(path: Path, limit: int, *, within: Path | None = None) -> bytes:
    """Returns the content of the file at ``path``, which has at most ``limit`` bytes.

    Raises FileNotFoundError and QplugError as ``open_regular`` does, and QplugError for a longer
    file.
    """
    with open_regular(path, within=within) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _too_long(path, limit)
        try:
            content = file.read(limit + 1)  # a file of the kernel has no size
        except (OSError, MemoryError) as error:
            raise _unreadable(path, error) from error
    if len(content) > limit:
        raise _too_long(path, limit)
    return content


def read_text(path: Path, limit: int, *, within: Path | None = None) -> str:
    """Returns the text of the UTF-8 file at ``path``, unchanged; otherwise as ``read_bytes``.

    Raises QplugError if the file is not UTF-8.
    """
    try:
        return read_bytes(path, limit, within=within).decode("utf-8")
    except UnicodeDecodeError as error:
        raise QplugError(
            f"{path}: cannot be read: not UTF-8, at byte {error.start}: save it as UTF-8"
        ) from error


def refuse_link_out(path: Path, folder: Path) -> None:
    """Raises QplugError if ``path`` is a link to something outside of ``folder``.

    Otherwise a folder from a stranger could make qplug read any file of this machine and copy it
    to OUT. The Hub's cache is allowed: it links from ``snapshots/REVISION`` to ``blobs``, a
    neighbour of ``snapshots``.
    """
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # before Python 3.13, RuntimeError: a loop
        raise _unreadable(path, error) from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise QplugError(f"{path}: is a link out of its folder; put the file itself there")


def _refuse_other_kinds(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise QplugError(f"{path}: cannot be read: it is {kind}")


def _too_long(path: Path, limit: int) -> QplugError:
    size = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit >> 10} KiB"
    return QplugError(f"{path}: is longer than {size}, the most that is read of it")


def _unreadable(path: Path, error: BaseException) -> QplugError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return QplugError(f"{path}: cannot be read: {reason or type(error).__name__}")
