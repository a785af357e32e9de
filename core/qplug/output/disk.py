"""Writes, moves and removes files: follows no link, replaces nothing, survives a power cut.

A file's bytes survive a power cut after ``os.fsync`` of the file. Its name survives after
``sync_folder`` of the folder that holds the name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

_NO_REPLACE = 1  # RENAME_NOREPLACE of renameat2(2)
_CURRENT_FOLDER = -100  # AT_FDCWD
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class StrangeFileError(Exception):
    """A file is not what qplug writes; the message ends a sentence that begins with its path."""


def open_own(path: Path, flags: int = 0, mode: int = 0o666) -> int:
    """Opens a file to read and write, and creates it if it is missing; returns the descriptor.

    Raises StrangeFileError if the file is a link, has a second name, is no regular file, or belongs
    to another user, and OSError if it cannot be opened.
    """
    with suppress(FileNotFoundError):
        refuse_strange(path)  # before it is opened: to open a device may do something
    file = os.open(path, _FLAGS | flags, mode)
    sentence = _strange(os.fstat(file))
    if sentence is not None:
        os.close(file)
        raise StrangeFileError(sentence)
    return file


def refuse_strange(path: Path, *, is_folder: bool = False) -> None:
    """Raises StrangeFileError if ``path`` is not a file, or a folder, that qplug itself can write.

    Raises FileNotFoundError if nothing is there.
    """
    sentence = _strange(path.lstat(), is_folder=is_folder)
    if sentence is not None:
        raise StrangeFileError(sentence)


def _strange(status: os.stat_result, *, is_folder: bool = False) -> str | None:
    """Returns why a file or folder is not one that qplug wrote; None if it may be."""
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if not (stat.S_ISDIR if is_folder else stat.S_ISREG)(status.st_mode):
        return "is not a folder" if is_folder else "is not a regular file"
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_nlink > 1 and not is_folder:
        return "has another name elsewhere (a hard link)"
    return None


def write_at(file: int, piece: bytes | memoryview, offset: int) -> int:
    """Writes bytes at ``offset`` of the file; returns the offset at which they end."""
    rest = memoryview(piece)
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count
    return offset


def write_new(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file, and syncs its bytes. A file of this name is removed first, not written over.

    So a link, or a second name of another file, leads to no other file.
    """
    path.parent.mkdir(exist_ok=True)
    remove(path)
    file = open_own(path, os.O_EXCL)
    try:
        offset = 0
        for piece in pieces:
            offset = write_at(file, piece, offset)
        os.fsync(file)
    finally:
        os.close(file)


def remove(path: Path) -> None:
    """Removes a file, if it is there."""
    with suppress(FileNotFoundError):
        path.unlink()


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a power cut, where the file system can do that."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a folder that may be written and not be read
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(folder)


def move(old: Path, new: Path) -> None:
    """Renames a file or a folder. Raises FileExistsError if ``new`` exists, which stays as it is.

    Where the system has no such call, ``new`` is looked for first.
    """
    rename = _renameat2()
    if rename is not None:
        if rename(os.fsencode(old), os.fsencode(new)) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(old), None, str(new))
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    old.rename(new)


@cache
def _renameat2() -> Callable[[bytes, bytes], int] | None:
    """Returns a function that renames and never replaces; None if the C library has none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return None

    def rename(old: bytes, new: bytes) -> int:
        return int(call(_CURRENT_FOLDER, old, _CURRENT_FOLDER, new, _NO_REPLACE))

    return rename
