"""Records the finished steps of a run on disk, so that the same command can resume a killed run.

Every line is a JSON object that ends with its own checksum. The first line describes the run, the
others are entries. A line that a kill cut short or that is damaged in any byte ends the journal:
the line and all lines after it are ignored.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from qplug.errors import QplugError
from qplug.output import disk

_CHECKSUM = b', "crc32": '
_LONGEST = 1 << 28  # bytes of a line


@dataclass(frozen=True)
class Run:
    """The first line of a journal: what identifies the run, and the names of the files it writes.

    ``files`` are relative paths in the folder of the model, ``learned`` are the names of the
    algorithms that learn on the whole model.
    """

    fingerprint: Mapping[str, Any]
    files: frozenset[str] = field(default_factory=frozenset)
    learned: frozenset[str] = field(default_factory=frozenset)

    def to_dict(self) -> dict[str, Any]:
        """Returns a mapping for JSON, which ``from_dict`` reads."""
        return {
            "run": dict(self.fingerprint),
            "files": sorted(self.files),
            "learned": sorted(self.learned),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Run | None:
        """Returns the run that ``to_dict`` wrote as ``plain``; None if it wrote something else."""
        run, files, learned = (plain.get(key) for key in ("run", "files", "learned"))
        if not (isinstance(run, dict) and _are_names(files) and _are_names(learned)):
            return None
        assert isinstance(files, list)
        assert isinstance(learned, list)
        return cls(run, frozenset(files), frozenset(learned))


class Journal:
    """The journal of one run, locked while it is open.

    Raises QplugError if another process has it open, or if it is a link or another user's file.
    """

    def __init__(self, path: Path) -> None:
        self._seed = 0  # the checksum of the first line: lines of another run do not fit behind it
        self._ends: list[int] = []  # of the lines that were read
        try:
            self._file = disk.open_own(path, os.O_APPEND, 0o600)
        except disk.StrangeFileError as error:
            raise QplugError(f"{path}: {error}; delete it") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), path.lstat()):
                    return  # else the process that held the lock has removed the journal
            raise BlockingIOError
        except OSError:
            self.close()
            raise QplugError(f"{path.parent}: another qplug is writing there") from None

    def read(self) -> tuple[Run | None, list[dict[str, Any]]]:
        """Returns the run, None in a new or damaged journal, and the entries in order."""
        self._seed, self._ends = 0, []
        lines: list[dict[str, Any]] = []
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            while (entry := self._next(file)) is not None:
                lines.append(entry)
        run = Run.from_dict(lines[0]) if lines else None
        return run, lines[1:] if run else []

    def keep(self, count: int) -> None:
        """Cuts the journal, which was read, after its first line and ``count`` entries."""
        os.ftruncate(self._file, self._ends[count])

    def is_old(self) -> bool:
        """Whether the journal is in the format without checksums, which earlier versions wrote."""
        try:
            first = json.loads(self._text().partition(b"\n")[0])
        except (ValueError, RecursionError):
            return False
        return isinstance(first, dict) and {"model", "recipe", "versions"} <= first.keys()

    def is_blank(self) -> bool:
        """Whether the journal has no content: the system lost power before it was written."""
        return not self._text().strip(b"\0")

    def restart(self, run: Run) -> None:
        """Deletes all lines, begins with ``run``, and waits until the disk has the line."""
        os.ftruncate(self._file, 0)
        self._seed = 0
        self._seed = self._append(run.to_dict())
        self.sync()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line and hands it to the operating system, so that it survives a kill.

        Raises ValueError if a number in ``entry`` is not finite.
        """
        self._append(entry)

    def sync(self) -> None:
        """Waits until the disk has all lines, so that they survive a power cut."""
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file, which releases the lock."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    # --- lines -----------------------------------------------------------------------------------

    def _append(self, entry: Mapping[str, Any]) -> int:
        """Adds a line; returns its checksum."""
        body = json.dumps(entry, allow_nan=False).encode()[:-1]
        crc = zlib.crc32(body, self._seed)
        rest = memoryview(body + _CHECKSUM + f"{crc}}}\n".encode())
        while rest:
            rest = rest[os.write(self._file, rest) :]
        return crc

    def _next(self, file: BinaryIO) -> dict[str, Any] | None:
        """Returns the content of the next line; None if there is none, or a damaged one."""
        line = file.readline(_LONGEST)
        body, _, end = line.rpartition(_CHECKSUM)
        crc = zlib.crc32(body, self._seed)
        if not body or end != f"{crc}}}\n".encode():
            return None
        try:
            entry = json.loads(body + b"}")
        except (ValueError, RecursionError):
            return None
        if not isinstance(entry, dict):
            return None
        if not self._ends:
            self._seed = crc
        self._ends.append(file.tell())
        return entry

    def _text(self) -> bytes:
        """Returns the beginning of the file, 1 MiB at most."""
        return os.pread(self._file, 1 << 20, 0)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns the keys in which two fingerprints differ, with commas between them.

    Settings of the environment, whose keys are in capitals, come with their old values.
    """
    keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    return ", ".join(f"{k} (it was {old[k]})" if k.isupper() and k in old else k for k in keys)
