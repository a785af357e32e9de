"""Lets the thread that launches kernels have the interpreter back soon.

Threads that read, sum and write tensors hold it in turns of 5 ms, and a launch takes 10 µs: each
launch that meets another thread's turn waits for its end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds of a turn.
_TURN = 5e-4


@contextmanager
def short_turns() -> Iterator[None]:
    """A context in which threads that wait for the interpreter have it after half a millisecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(_TURN, before))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
