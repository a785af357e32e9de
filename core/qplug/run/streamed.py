"""Runs without calibration data: rounds one tensor while the next ones are read from disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from qplug.checkpoint.into_memory import READERS, is_plain, nbytes_of
from qplug.output.source_bytes import SourceBytes
from qplug.run.steps import Finished, Steps

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes of weights that are read ahead of the work, at most, unless a single step has more.
_AHEAD = 1 << 28


def streamed(steps: Steps, done: Collection[int], source: SourceBytes) -> Iterator[Finished]:
    """Yields every step that is not ``done``, in order, computed.

    ``source`` sees what is read. The first process does all the work, since most of the time goes
    into reading and writing.
    """
    if not steps.session.processes.is_first:
        return
    with _ReadAhead(steps, source, done) as ahead:
        for number, weights in ahead:
            if weights:
                yield steps.quantized(number, weights, steps.stages.quantize)
            else:
                yield steps.copied(number)


class _ReadAhead:
    """Reads the weights of steps in several threads, in order, before they are needed.

    The threads also compute checksums: the bytes are in the cache of the processor then. Steps
    whose weights are computed from what is stored are read alone, since each computation needs
    memory of its own.
    """

    def __init__(self, steps: Steps, source: SourceBytes, done: Collection[int]) -> None:
        self._steps, self._source = steps, source
        self._todo = deque(n for n in range(len(steps.plan.steps)) if n not in done)
        # Steps by number, the bytes of their weights, and the weights.
        self._coming: deque[tuple[int, int, Future[dict[str, Tensor]]]] = deque()
        self._threads = ThreadPoolExecutor(READERS, "qplug-reader")

    def __enter__(self) -> _ReadAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields each step's number and its weights."""
        self._read_on()
        while self._coming:
            number, _, coming = self._coming.popleft()
            with self._steps.session.clock("reading"):
                weights = coming.result()
            del coming  # it would keep the weights in memory
            self._read_on()
            yield number, weights

    def _read_on(self) -> None:
        """Begins to read further steps, as far as there is room for them."""
        while self._todo:
            stored = self._steps.stored_weights(self._steps.plan.steps[self._todo[0]]).values()
            alone = not all(map(is_plain, stored))
            size = _AHEAD if alone else nbytes_of(stored)
            if self._coming and size + sum(size for _, size, _ in self._coming) > _AHEAD:
                return
            number = self._todo.popleft()
            self._coming.append((number, size, self._threads.submit(self._read, number)))

    def _read(self, number: int) -> dict[str, Tensor]:
        weights = self._steps.weights(self._steps.plan.steps[number])
        for name, value in weights.items():
            self._source.see(name, value)
        return weights
