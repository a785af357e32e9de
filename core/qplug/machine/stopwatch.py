"""Measures each stage of a run: seconds, and peak memory of the process and of a GPU."""

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
    """Measures stages: ``with stopwatch("reading"): ...`` counts to the stage ``reading``.

    Stages may be nested; time then counts to the innermost. A stage costs a few system calls. On a
    GPU the stopwatch also waits, at both ends of a stage, until the GPU has finished its work, so
    that this work counts to the stage that started it.
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
        peaks_before = [gauge.peak() for gauge in self._gauges]
        sums.raise_to([gauge.now() for gauge in self._gauges])
        try:
            yield
        finally:
            self._count()
            self._open.pop()
            amounts = []
            for gauge, peak_before in zip(self._gauges, peaks_before, strict=True):
                peak = gauge.peak()
                amounts.append(peak if peak > peak_before else gauge.now())
            sums.raise_to(amounts)

    def costs(self) -> tuple[StageCost, ...]:
        """Returns the cost of every stage, in the order in which the stages first began."""
        return tuple(
            StageCost(name, sums.seconds, sums.peaks[0] or None, sums.peaks[1] or None)
            for name, sums in self._stages.items()
        )

    def _count(self) -> None:
        """Adds the time since the last call to the innermost open stage."""
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
        now = time.monotonic()
        if self._open:
            self._open[-1].seconds += now - self._since
        self._since = now


@dataclass
class _Sums:
    """The seconds of one stage, and its peaks in bytes: of the process, of the GPU."""

    seconds: float = 0.0
    peaks: list[int] = field(default_factory=lambda: [0, 0])

    def raise_to(self, amounts: list[int]) -> None:
        """Raises each peak to the amount at its place if that is larger."""
        self.peaks = [max(pair) for pair in zip(self.peaks, amounts, strict=True)]


class _Gauge(Protocol):
    """Reads one kind of memory, in bytes: the amount now, and the peak since the start."""

    def now(self) -> int: ...

    def peak(self) -> int: ...


class _Resident:
    """The resident memory of the process; where the system reports only a peak, that peak."""

    def __init__(self) -> None:
        self._statm = Path("/proc/self/statm")
        self._page = 0
        if self._statm.exists():
            import resource

            self._page = resource.getpagesize()

    def now(self) -> int:
        if not self._page:
            return self.peak()
        # Not a file object: if Ctrl-C came before its end, Python would warn that it is not closed.
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
    """The memory that torch has allocated on a GPU; 0 without a GPU."""

    def __init__(self, gpu: torch.device | None) -> None:
        self._gpu = gpu

    def now(self) -> int:
        return 0 if self._gpu is None else torch.cuda.memory_allocated(self._gpu)

    def peak(self) -> int:
        return 0 if self._gpu is None else torch.cuda.max_memory_allocated(self._gpu)
