"""Records the finished steps of a run on disk, so that the same command can resume a killed run.

Every line is a JSON object: first the fingerprint of the run, then the finished steps, with
checksums of the tensors they wrote. A line that a kill cut short is ignored, and so are all lines
after it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qplug.errors import QplugError


class Journal:
    """The journal of one run, locked while it is open.

    Raises QplugError if another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise QplugError(f"{path.parent}: another qplug is writing there") from None

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Returns the fingerprint, None in a new journal, and the finished steps in order.

        Truncates the file to its valid lines.
        """
        self._file.seek(0)
        entries, valid_bytes = [], 0
        for line in self._file.read().splitlines(keepends=True):
            entry = _parse(line)
            if entry is None:
                break
            entries.append(entry)
            valid_bytes += len(line.encode())
        self._file.truncate(valid_bytes)
        return (entries[0], entries[1:]) if entries else (None, [])

    def restart(self, fingerprint: Mapping[str, Any]) -> None:
        """Deletes all entries and begins a run with ``fingerprint``."""
        self._file.truncate(0)
        self.append(fingerprint)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line and hands it to the operating system, so that it survives a kill."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file, which releases the lock."""
        self._file.close()


def _parse(line: str) -> dict[str, Any] | None:
    """Returns the entry in a line; None if the line is cut short or not a JSON object."""
    try:
        entry = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns the keys in which two fingerprints differ, with commas between them."""
    return ", ".join(sorted(k for k in {*old, *new} if old.get(k) != new.get(k)))
