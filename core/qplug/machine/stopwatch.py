"""What each stage of a run costs: seconds, and the most memory that was held in it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from qplug.api.events import StageCost


class Stopwatch:
    """Called with a stage's name, a context in which time and memory count to that stage.

    Stages may be within one another: time counts to the innermost. A few system calls each, and on
    a GPU a wait for what was begun, for that too belongs to its stage.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._gauges: tuple[_Gauge, ...] = (_Resident(), _Allocated(self._gpu))
        self._stages: dict[str, _Sums] = {}
        self._open: list[_Sums] = []
        self._since = time.monotonic()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        sums = self._stages.setdefault(stage, _Sums())
        self._count()
        self._open.append(sums)
        before = [gauge.peak() for gauge in self._gauges]
        sums.hold([gauge.now() for gauge in self._gauges])
        try:
            yield
        finally:
            self._count()
            self._open.pop()
            peaks = [
                (gauge, gauge.peak(), old) for gauge, old in zip(self._gauges, before, strict=True)
            ]
            sums.hold([peak if peak > old else gauge.now() for gauge, peak, old in peaks])

    def costs(self) -> tuple[StageCost, ...]:
        """Every stage, in the order in which they were first begun."""
        return tuple(
            StageCost(name, sums.seconds, sums.most[0] or None, sums.most[1] or None)
            for name, sums in self._stages.items()
        )

    def _count(self) -> None:
        """Add the time that has gone by to the innermost stage."""
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
        now = time.monotonic()
        if self._open:
            self._open[-1].seconds += now - self._since
        self._since = now


@dataclass
class _Sums:
    seconds: float = 0.0
    most: list[int] = field(default_factory=lambda: [0, 0])

    def hold(self, amounts: list[int]) -> None:
        self.most = [max(pair) for pair in zip(self.most, amounts, strict=True)]


class _Gauge(Protocol):
    """Bytes of memory: those held now, and the most there ever were."""

    def now(self) -> int: ...

    def peak(self) -> int: ...


class _Resident:
    """What the process has in memory; where only the peak can be told, that."""

    def __init__(self) -> None:
        self._statm = Path("/proc/self/statm")
        self._page = 0
        if self._statm.exists():
            import resource

            self._page = resource.getpagesize()

    def now(self) -> int:
        if not self._page:
            return self.peak()
        # A file object would be warned of, if Ctrl-C came before it is closed.
        file = os.open(self._statm, os.O_RDONLY)
        try:
            return int(os.read(file, 256).split()[1]) * self._page
        finally:
            os.close(file)

    def peak(self) -> int:
        if sys.platform == "win32":
            return 0
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Allocated:
    """What torch has allocated on a GPU; 0 without one."""

    def __init__(self, gpu: torch.device | None) -> None:
        self._gpu = gpu

    def now(self) -> int:
        return 0 if self._gpu is None else torch.cuda.memory_allocated(self._gpu)

    def peak(self) -> int:
        return 0 if self._gpu is None else torch.cuda.max_memory_allocated(self._gpu)
