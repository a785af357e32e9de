"""What a run has finished, so that the same command goes on where it was killed.

One JSON object a line: the fingerprint of the run first, then each finished step with a checksum
of what it wrote. A line that a kill cut short does not count, nor do those after it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qplug.errors import QplugError


class Journal:
    """The journal of one run, locked while this process has it open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise QplugError(f"{path.parent}: another qplug is writing there") from None

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The fingerprint, or None if the journal is new, and the finished steps in order."""
        self._file.seek(0)
        entries, whole = [], 0
        for line in self._file.read().splitlines(keepends=True):
            entry = _parse(line)
            if entry is None:
                break
            entries.append(entry)
            whole += len(line.encode())
        self._file.truncate(whole)
        return (entries[0], entries[1:]) if entries else (None, [])

    def restart(self, fingerprint: Mapping[str, Any]) -> None:
        """Forget everything and begin a run with ``fingerprint``."""
        self._file.truncate(0)
        self.append(fingerprint)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Let go of the lock."""
        self._file.close()


def _parse(line: str) -> dict[str, Any] | None:
    """What a line tells; None if a kill cut it short, or a power cut left other bytes there."""
    try:
        entry = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The keys in which two fingerprints differ, for a message."""
    return ", ".join(sorted(k for k in {*old, *new} if old.get(k) != new.get(k)))
