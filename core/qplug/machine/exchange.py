"""Exchanges between the processes of a run, over torch.distributed.

Every process goes through the same exchanges in the same order. Each exchange begins with an
announcement from every process, through which a failure of one reaches all others; tensors follow
only if no process has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from qplug.errors import OtherProcessError
from qplug.machine.bundles import as_bytes, bundles, joined, taken_apart
from qplug.machine.launch import Launch
from qplug.machine.messages import Announcement, Failure, Message, Packed, pack, unpack
from qplug.machine.neighbours import Place, first_left
from qplug.machine.processes import ALONE, Processes, shares_of

if TYPE_CHECKING:
    from torch.distributed import ReduceOp
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
R = TypeVar("R")

#: How long a process may work while the others wait. One that ends is noticed at once.
_PATIENCE = timedelta(hours=12)


def join(launch: Launch, device: torch.device) -> Processes:
    """The processes that were launched together, as a context manager."""
    return ALONE if launch.count == 1 else JoinedProcesses(launch, device)


class JoinedProcesses(Processes):
    """One of several processes; in memory they talk by gloo, tensors on GPUs go by nccl."""

    def __init__(self, launch: Launch, device: torch.device) -> None:
        self.rank, self.count, self._device = launch.rank, launch.count, device
        #: Whether all processes are between exchanges, as far as this one knows.
        self._in_step = True
        #: Whether all processes know of a failure.
        self._failure_known = False
        #: Of all processes, by rank; this one alone until they have met.
        self._places: list[Place] = []

    def __enter__(self) -> Processes:
        # Import before the process group exists: the module stores the current group as a default
        # argument, which would keep its threads alive at exit.
        import torch.distributed.nn.functional
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore

        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self._device)
        meeting = _meeting_place()
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=_PATIENCE,
            store=PrefixStore(str(next(meeting.times)), meeting.store),
            rank=self.rank,
            world_size=self.count,
            device_id=self._device if on_gpu else None,
        )
        self._places = self.gather(Place.own())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from torch import distributed

        try:
            if error is None:
                self._agree("the end")
            elif self._in_step and not self._failure_known:
                self._announce_failure(error)
            elif isinstance(error, OtherProcessError) and not self._failure_known:
                error.first_left = first_left(self._places, self.rank)
        finally:
            if self._in_step and self._failure_known:
                self._wait_for_all()
            # If a process has ended, nccl would wait for it here; the end of this one will do.
            if self._in_step or self._device.type == "cpu":
                distributed.destroy_process_group()

    # --- exchanges -------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        return self._gather("gather", value)

    def _gather(self, exchange: str, value: T) -> list[T]:
        packed = pack(value)
        messages = self._agree(exchange, packed.message)
        with self._exchanging():
            return [
                unpack(message, self._broadcast(message, packed.tensors, rank))
                for rank, message in enumerate(messages)
            ]

    def from_first(self, make: Callable[[], T]) -> T:
        packed = pack(make()) if self.is_first else Packed()
        message = self._agree("from the first", packed.message)[0]
        with self._exchanging():
            value: T = unpack(message, self._broadcast(message, packed.tensors, 0))
            return value

    def reduce(
        self,
        *,
        sums: Sequence[Tensor] = (),
        least: Sequence[Tensor] = (),
        most: Sequence[Tensor] = (),
    ) -> None:
        from torch.distributed import ReduceOp

        self._agree("reduce")
        with self._exchanging():
            _reduce(sums, ReduceOp.SUM)
            _reduce(least, ReduceOp.MIN)
            _reduce(most, ReduceOp.MAX)

    def spread(
        self,
        items: Sequence[T],
        work: Callable[[T], R],
        cost: Callable[[T], float] | None = None,
    ) -> list[R]:
        costs = [1.0 if cost is None else cost(item) for item in items]
        shares = shares_of(costs, self.count)
        mine = {number: work(items[number]) for number in shares[self.rank]}
        results: dict[int, R] = {}
        for part in self._gather(f"spread {len(items)} items", mine):
            results.update(part)
        return [results[number] for number in range(len(items))]

    # --- announcements ---------------------------------------------------------------------------

    def _agree(self, exchange: str, message: Message | None = None) -> list[Message]:
        """Begins ``exchange``, and returns the messages of all processes, by rank.

        Raises the first failure if a process has failed, RuntimeError if processes are at different
        exchanges.
        """
        announcements = self._announce(Announcement(exchange, message or Message()))
        failures = [said.failure for said in announcements if said.failure is not None]
        if failures:
            self._failure_known = True
            raise failures[0].as_error()
        if len({said.exchange for said in announcements}) > 1:
            self._in_step = False
            exchanges = ", ".join(
                f"process {rank}: {said.exchange}" for rank, said in enumerate(announcements)
            )
            raise RuntimeError(f"the processes do not do the same ({exchanges})")
        return [said.message for said in announcements]

    def _announce_failure(self, error: BaseException) -> None:
        """Makes all other processes fail too. Raises the failure of a lower rank, if any."""
        failure = Failure.of(error, self.rank)
        try:
            announcements = self._announce(Announcement("failure", Message(), failure))
        except OtherProcessError:
            return  # no other process is left
        self._failure_known = True
        first = next(said.failure for said in announcements if said.failure is not None)
        if first.rank != self.rank:
            raise first.as_error() from error

    def _announce(self, announcement: Announcement) -> list[Announcement]:
        """Sends ``announcement``, and returns the announcements of all processes, by rank."""
        from torch.distributed import all_gather_object

        announcements = [announcement] * self.count
        with self._exchanging(), _noticing_the_end():
            all_gather_object(announcements, announcement)
        return announcements

    def _broadcast(self, message: Message, mine: list[Tensor], rank: int) -> list[Tensor]:
        """The tensors that follow ``message`` of process ``rank``; ``mine`` are this process's."""
        from torch.distributed import broadcast

        is_mine = rank == self.rank
        tensors = mine if is_mine else message.empty_tensors(self._device)
        for places in bundles([(tensor.nbytes, tensor.device) for tensor in tensors]):
            own = [tensors[place] for place in places]
            # As bytes: not every transport knows every dtype.
            together = as_bytes(own[0]) if len(own) == 1 else joined(own)
            with _noticing_the_end():
                broadcast(together, rank)
            if len(own) > 1 and not is_mine:
                taken_apart(together, own)
        return tensors

    def _wait_for_all(self) -> None:
        """Waits until each process has cleaned up: the first one to end would stop the others."""
        from torch.distributed import all_gather_object

        try:
            all_gather_object([None] * self.count, None)
        except RuntimeError:  # a process ended without an announcement
            self._in_step = False

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Marks an exchange. A process that fails inside one can no longer send.

        The other processes notice only when that process exits.
        """
        self._in_step = False
        yield
        self._in_step = True


def _reduce(tensors: Sequence[Tensor], operation: ReduceOp.RedOpType) -> None:
    """Replaces ``tensors`` in place by what ``operation`` makes of them over all processes."""
    from torch.distributed import all_reduce

    sizes = [(tensor.nbytes, (tensor.dtype, tensor.device)) for tensor in tensors]
    for places in bundles(sizes):
        own = [tensors[place] for place in places]
        together = own[0] if len(own) == 1 else torch.cat([tensor.flatten() for tensor in own])
        with _noticing_the_end():
            all_reduce(together, operation)
        if len(own) > 1:
            parts = together.split([tensor.numel() for tensor in own])
            for tensor, part in zip(own, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


@dataclass(frozen=True)
class _MeetingPlace:
    """Where processes find one another; each time they join is numbered by ``times``."""

    store: Store
    times: Iterator[int]


@cache
def _meeting_place() -> _MeetingPlace:
    """The meeting place of this process, opened once.

    A second store on the same port could be taken for the first. Environment variables say where it
    is, as torchrun sets them.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
    return _MeetingPlace(store, count())


@contextmanager
def _noticing_the_end() -> Iterator[None]:
    """Within it, the error of a transport that lost its peer becomes OtherProcessError."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessError(
            "another process of this run has ended; the same command goes on from here"
        ) from error
