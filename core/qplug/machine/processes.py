"""The processes of a run: what they exchange, and how they divide work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


class Processes:
    """The processes of a run. This class is for a single process: nothing is exchanged."""

    rank = 0
    count = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every process, by rank; tensors in them are contiguous.

        Values can be anything that pickle takes. Tensors that left from a GPU arrive on the device
        of this process, all others in memory.
        """
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of ``make()`` on the first process; it is called nowhere else."""
        return make()

    def reduce(
        self,
        *,
        sums: Sequence[Tensor] = (),
        least: Sequence[Tensor] = (),
        most: Sequence[Tensor] = (),
    ) -> None:
        """Replace tensors in place by their sums, minima or maxima over all processes."""

    def spread(
        self,
        items: Sequence[T],
        work: Callable[[T], R],
        cost: Callable[[T], float] | None = None,
    ) -> list[R]:
        """``work(item)`` for all items, in order; each process does a part and gets all results.

        ``cost``: the expected time of an item, in any unit.
        """
        return [work(item) for item in items]

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the other processes. If one has failed, all raise."""


#: A run of one process.
ALONE = Processes()


def shares_of(costs: Sequence[float], count: int) -> list[list[int]]:
    """Divides items with ``costs`` among ``count`` processes; returns the items of each.

    The most expensive item comes first, and goes to the process with the least to do.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        rank = loads.index(min(loads))
        shares[rank].append(number)
        loads[rank] += costs[number]
    return [sorted(share) for share in shares]
