"""Tells folders that qplug wrote from all others, and removes nothing that qplug did not write."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from qplug.errors import QplugError
from qplug.files.json_text import read_json
from qplug.output import disk
from qplug.output.checksums import CHECKSUMS
from qplug.output.manifest import MANIFEST, read_manifest


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raises QplugError if ``out`` must not be written: it exists, or its parent does not.

    With ``overwrite`` an existing folder is accepted if it is empty, or if qplug wrote it and
    nobody put anything else into it. A link and a parent of the current folder are not accepted.
    """
    if os.path.lexists(out):  # unlike Path.exists(), does not raise on a name that is too long
        if not overwrite:
            raise QplugError(f"{out}: exists; choose another folder, or pass --overwrite")
        if Path.cwd().is_relative_to(out.resolve()):
            raise QplugError(f"{out}: is or contains the current folder, so it is not overwritten")
        sentence = not_own(out)
        if sentence is not None:
            raise QplugError(f"{out}: {sentence}, so it is not overwritten; choose another folder")
    if not out.absolute().parent.is_dir():
        raise QplugError(f"{out.absolute().parent}: no such folder to write into")


def not_own(folder: Path) -> str | None:
    """Returns why ``folder`` is not qplug's to remove, as the end of a sentence; None if it is.

    It is if it is empty, or if it has a qplug.json that qplug wrote, and all other files are those
    that qplug.json lists. A qplug.json of an earlier version lists none; then all are accepted.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "is not a folder"
    if not any(folder.iterdir()):
        return None
    try:
        names = written_names(folder)
    except QplugError:
        return f"has a {MANIFEST} that this qplug cannot read"
    if names is None:
        return "is not a folder that qplug wrote"
    extra = foreign(folder, names) if names else None
    return f"holds {extra.relative_to(folder)}, which qplug did not write" if extra else None


def written_names(folder: Path) -> frozenset[str] | None:
    """Returns the relative paths of the files in ``folder`` that its qplug.json lists.

    They are empty if an earlier version of qplug wrote the folder, and None if qplug did not.
    Raises QplugError if qplug.json is damaged.
    """
    manifest = folder / MANIFEST
    with suppress(FileNotFoundError):
        found = manifest.lstat()
        if stat.S_ISREG(found.st_mode):
            return _listed(manifest, (found.st_ino, found.st_size, found.st_ctime_ns))
    return None


# A run that replaces a folder asks several times, and a model with many experts has a manifest that
# takes a second to read.
@lru_cache(maxsize=2)
def _listed(manifest: Path, identity: tuple[int, int, int]) -> frozenset[str] | None:
    """Returns ``written_names`` of the file ``manifest``, as long as it is the one of ``identity``.

    ``identity``: its inode, size, and the time of its last change.
    """
    if read_manifest(manifest.parent) is None:
        return None
    checksums = read_json(manifest).get(CHECKSUMS)
    if checksums is None:
        return frozenset()
    try:
        return frozenset({MANIFEST, *_names(checksums["headers"]), *_names(checksums["files"])})
    except (KeyError, TypeError) as error:
        raise QplugError(f"{manifest}: is damaged: {error!r}") from error


def _names(by_file: dict[str, Any]) -> list[str]:
    """Returns the keys, which are relative paths. Raises TypeError if they are something else."""
    if not isinstance(by_file, dict):
        raise TypeError("files are not a mapping")
    return list(by_file)


def foreign(folder: Path, names: Collection[str]) -> Path | None:
    """Returns the first path in ``folder`` that is not one of the relative paths ``names``.

    A link, or anything but a file, under such a name is not qplug's either.
    """
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    for path in _walk(folder):
        name, status = path.relative_to(folder).as_posix(), path.lstat()
        if name in names and stat.S_ISREG(status.st_mode):
            continue
        if name in folders and stat.S_ISDIR(status.st_mode):
            continue
        return path
    return None


def remove_written(folder: Path, names: Collection[str]) -> None:
    """Removes the files ``names`` in ``folder``, and ``folder`` too if nothing else is in it.

    qplug.json is removed last, since it lists the others.
    """
    for name in sorted(names, key=lambda name: (name == MANIFEST, name)):
        if not _leads_out(folder, name):
            with suppress(IsADirectoryError, NotADirectoryError):
                disk.remove(folder / name)
    folders = {parent for name in names for parent in PurePosixPath(name).parents}
    for parent in sorted(folders, key=lambda parent: -len(parent.parts)):
        with suppress(OSError):  # something else is in it
            (folder / parent).rmdir()
    with suppress(OSError):
        folder.rmdir()


def _leads_out(folder: Path, name: str) -> bool:
    """Whether the relative path ``name`` leaves ``folder``, by its words or by a link."""
    *parents, _ = parts = PurePosixPath(name).parts
    if ".." in parts or PurePosixPath(name).is_absolute():
        return True
    return any(folder.joinpath(*parents[: n + 1]).is_symlink() for n in range(len(parents)))


def remove_own(folder: Path) -> None:
    """Removes a folder of which ``not_own`` said that it is qplug's, or what is left of it."""
    names = written_names(folder)
    if names:
        remove_written(folder, names)
    else:  # of an earlier version, or empty
        shutil.rmtree(folder)


def _walk(folder: Path) -> Iterator[Path]:
    """Yields all paths in ``folder`` by name, a folder before its contents; follows no link."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
