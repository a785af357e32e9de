"""Compares the files of a folder with the checksums that ``qplug.json`` stores for them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qplug.api import Problem
from qplug.checkpoint.tensor_file import FileTensor, read_header
from qplug.errors import QplugError
from qplug.files.json_text import read_json
from qplug.output.checksums import (
    CHECKSUM,
    CHECKSUMS,
    KIND,
    crc32,
    file_checksum,
    header_checksum,
    record_checksum,
)
from qplug.output.manifest import MANIFEST

#: A thread reads about so many bytes before it takes the next part of the work.
_PART_BYTES = 1 << 26
#: More threads than these are not faster than a disk.
_MOST_THREADS = 16


@dataclass(frozen=True)
class Damage:
    """What differs from its checksum. ``compared``: the number of checksums that were compared.

    ``compared`` is 0 if the folder has no checksums.
    """

    compared: int
    problems: tuple[Problem, ...]


def missing_files(folder: Path) -> list[Problem]:
    """Returns a problem for each file of ``qplug.json`` that is gone or has another size."""
    if not os.path.lexists(folder / MANIFEST):
        return []
    sums = read_json(folder / MANIFEST, within=folder).get(CHECKSUMS)
    if not isinstance(sums, Mapping):
        return []
    found = []
    for name in (*sums.get("files", {}), *sums.get("headers", {})):
        if not (folder / name).is_file():
            found.append(Problem("damaged", name, f"has a checksum in {MANIFEST}, but is not here"))
    for name, stated in sums.get("files", {}).items():
        if (folder / name).is_file() and (folder / name).stat().st_size != stated.get("bytes"):
            found.append(_differs(name))
    return found


def find_damage(folder: Path) -> Damage:
    """Read all files of ``folder``, and report what differs from its checksum in ``qplug.json``.

    Every byte that qplug wrote is covered: tensors, the headers of their files, the other files,
    and ``qplug.json``. Files that qplug did not write are not read. Raises QplugError if
    ``qplug.json`` cannot be read, or if its checksums are of a kind that this qplug does not know.
    """
    if not os.path.lexists(folder / MANIFEST):
        return Damage(0, ())
    record = read_json(folder / MANIFEST, within=folder)
    if CHECKSUMS not in record and CHECKSUM not in record:
        return Damage(0, ())
    try:
        stated = _Stated.read(record)
        intact = record_checksum(record) == record[CHECKSUM]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"its checksums are damaged: {type(error).__name__}: {error}"
        return Damage(1, (Problem("damaged", MANIFEST, reason),))
    if stated.kind != KIND:
        raise QplugError(
            f"{folder / MANIFEST}: has checksums of the kind {stated.kind!r}, which this qplug "
            "does not know; install the qplug that wrote the folder"
        )
    if not intact:  # then its other checksums say nothing
        return Damage(1, (_differs(MANIFEST),))
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "qplug-checksum") as threads:
        files = list(threads.map(lambda item: _check_file(folder, *item), stated.files.items()))
        headers = list(
            threads.map(lambda item: _check_header(folder, *item), stated.headers.items())
        )
        problems = [problem for found in (*files, *headers) for problem in found]
        if not any(headers):
            problems += _check_tensors(folder, stated, threads)
    return Damage(
        1 + len(stated.files) + len(stated.headers) + len(stated.tensors), tuple(problems)
    )


@dataclass(frozen=True)
class _Stated:
    """The checksums in ``qplug.json``: by path in the folder, or by name of the tensor."""

    kind: str
    tensors: Mapping[str, int]
    headers: Mapping[str, int]
    files: Mapping[str, Mapping[str, int]]

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> _Stated:
        stated = record[CHECKSUMS]
        tensors, headers, files = stated["tensors"], stated["headers"], stated["files"]
        return cls(
            stated["kind"], dict(tensors), dict(headers), {n: dict(f) for n, f in files.items()}
        )


def _differs(where: str) -> Problem:
    return Problem("damaged", where, f"differs from its checksum in {MANIFEST}")


def _missing(where: str) -> Problem:
    return Problem("damaged", where, f"has a checksum in {MANIFEST}, but is not here")


def _inside(folder: Path, name: str) -> Path | None:
    """The regular file ``name`` of ``folder``; None if there is none, or if it lies elsewhere."""
    path = folder / name
    outside = Path(name).is_absolute() or ".." in Path(name).parts
    try:
        return path if not outside and path.is_file() else None
    except OSError:  # a name that is too long
        return None


def _check_file(folder: Path, name: str, stated: Mapping[str, int]) -> list[Problem]:
    path = _inside(folder, name)
    if path is None:
        return [_missing(name)]
    # A file of another size is not read: it may be as long as a disk.
    sizes_agree = path.stat().st_size == stated.get("bytes")
    return [] if sizes_agree and file_checksum(path) == stated else [_differs(name)]


def _check_header(folder: Path, name: str, stated: int) -> list[Problem]:
    path = _inside(folder, name)
    if path is None:
        return [_missing(name)]
    return [] if header_checksum(path) == stated else [_differs(f"the header of {name}")]


def _check_tensors(folder: Path, stated: _Stated, threads: ThreadPoolExecutor) -> list[Problem]:
    """The problems of the tensors; the headers of their files must be intact."""
    tensors = {n: t for file in stated.headers for n, t in read_header(folder / file).items()}
    stored = sorted(tensors.items(), key=lambda item: (item[1].path, item[1].start))
    found = {
        name: crc for part in threads.map(_checksums, _parts(stored)) for name, crc in part.items()
    }
    problems = [_missing(name) for name in stated.tensors if name not in found]
    for name, crc in found.items():
        if name not in stated.tensors:
            problems.append(Problem("damaged", name, f"has no checksum in {MANIFEST}"))
        elif crc != stated.tensors[name]:
            problems.append(_differs(name))
    return problems


def _parts(tensors: Iterable[tuple[str, FileTensor]]) -> Iterator[list[tuple[str, FileTensor]]]:
    """The ``tensors`` in their order, in parts of about ``_PART_BYTES``."""
    part: list[tuple[str, FileTensor]] = []
    size = 0
    for name, tensor in tensors:
        part.append((name, tensor))
        size += tensor.nbytes
        if size >= _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _checksums(part: list[tuple[str, FileTensor]]) -> dict[str, int]:
    return {name: crc32(tensor.chunks()) for name, tensor in part}
