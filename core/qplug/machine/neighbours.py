"""The processes of a run on the same machine: which of them are still there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Seconds until the system knows of the end of a process whose connections have broken, at most.
_SOON = 0.05


@dataclass(frozen=True)
class Place:
    """The machine of a process, and its number there."""

    machine: str
    number: int

    @classmethod
    def own(cls) -> Place:
        """The place of this process."""
        return cls(socket.gethostname(), os.getpid())


def first_left(places: Sequence[Place], rank: int) -> bool:
    """Whether no process of a lower rank than ``rank`` is left on its machine.

    ``places``: of all processes, by rank. To be asked after a connection broke.
    """
    before = [place.number for place in places[:rank] if place.machine == places[rank].machine]
    give_up = time.monotonic() + _SOON
    while any(map(_is_running, before)):
        if time.monotonic() > give_up:
            return False
        time.sleep(_SOON / 10)
    return True


def _is_running(number: int) -> bool:
    """Whether the process exists and has not ended. One that nobody has waited for has."""
    try:
        # The name in parentheses may have anything in it, even more of them.
        line = Path(f"/proc/{number}/stat").read_text("utf-8", "replace")
    except OSError:
        return _can_be_signalled(number)
    return line.rpartition(")")[2].split()[0] not in "ZX"


def _can_be_signalled(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
