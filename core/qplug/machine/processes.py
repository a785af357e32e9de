"""Several processes on one run: who does what, and how they tell one another.

Every process goes through the same exchanges in the same order. An exchange begins with a word from
each, through which a failure of one reaches all the others; tensors follow only when all are well.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from qplug.errors import OtherProcessError, QplugError, RelayedError
from qplug.machine.launch import Launch

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
R = TypeVar("R")

#: How long a process may work while the others wait. One that ends is noticed at once.
_PATIENCE = timedelta(hours=12)


class Processes:
    """The processes of a run. This class is for one process alone: nothing is exchanged."""

    rank = 0
    count = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What every process gives, by rank: the same on each, tensors contiguous.

        Values can be what pickle takes. Tensors in them arrive on the device of this process if
        they left from one, else in memory.
        """
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on the first process; it is called nowhere else."""
        return make()

    def reduce(
        self,
        *,
        sums: Sequence[Tensor] = (),
        least: Sequence[Tensor] = (),
        most: Sequence[Tensor] = (),
    ) -> None:
        """Replace tensors in place by what all processes' make: sums, minima, maxima."""

    def spread(
        self,
        items: Sequence[T],
        work: Callable[[T], R],
        cost: Callable[[T], float] | None = None,
    ) -> list[R]:
        """``work`` of every item, in order; each process does a part, and all have all results.

        ``cost`` tells how long an item takes, in any unit.
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
        """Wait for the others. If one failed, all raise."""


#: A run of one process.
ALONE = Processes()


def join(launch: Launch, device: torch.device) -> Processes:
    """This process with those that were launched beside it, as a context manager.

    They talk by gloo; what lies on a GPU goes by nccl.
    """
    return ALONE if launch.count == 1 else _Joined(launch, device)


class _Joined(Processes):
    """One of several processes."""

    def __init__(self, launch: Launch, device: torch.device) -> None:
        self.rank, self.count, self._device = launch.rank, launch.count, device
        #: Whether the others can still be talked to, and whether a failure has been told to all.
        self._in_step, self._failure_told = True, False

    def __enter__(self) -> Processes:
        # Its functions take the group that there is when it is imported as their default: later, it
        # would keep the group, whose threads would then run on while the interpreter ends.
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
            elif self._in_step and not self._failure_told:
                self._tell(error)
        finally:
            if self._in_step and self._failure_told:
                self._wait_for_all()
            # Nccl would wait for those that are gone; the end of this process will do.
            if self._in_step or self._device.type == "cpu":
                distributed.destroy_process_group()

    # --- exchanges -------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        return self._gather("gather", value)

    def _gather(self, what: str, value: T) -> list[T]:
        packed = _pack(value)
        said = self._agree(what, packed.message)
        with self._exchange():
            return [
                _unpack(message, self._broadcast(message, packed.tensors, rank))
                for rank, message in enumerate(said)
            ]

    def from_first(self, make: Callable[[], T]) -> T:
        packed = _pack(make()) if self.is_first else _Packed()
        message = self._agree("from the first", packed.message)[0]
        with self._exchange():
            found: T = _unpack(message, self._broadcast(message, packed.tensors, 0))
            return found

    def reduce(
        self,
        *,
        sums: Sequence[Tensor] = (),
        least: Sequence[Tensor] = (),
        most: Sequence[Tensor] = (),
    ) -> None:
        from torch.distributed import ReduceOp, all_reduce

        self._agree("reduce")
        with self._exchange():
            for operation, tensors in (
                (ReduceOp.SUM, sums),
                (ReduceOp.MIN, least),
                (ReduceOp.MAX, most),
            ):
                for tensor in tensors:
                    with _noticing_the_end():
                        all_reduce(tensor, operation)

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

    def _agree(self, what: str, message: _Message | None = None) -> list[_Message]:
        """The messages of all, by rank. Raises the first failure, if a process has failed."""
        said = self._words(_Word(what, message or _Message()))
        failures = [word.failure for word in said if word.failure is not None]
        if failures:
            self._failure_told = True
            raise failures[0].as_error()
        if len({word.what for word in said}) > 1:
            self._in_step = False
            ways = ", ".join(f"process {rank}: {word.what}" for rank, word in enumerate(said))
            raise RuntimeError(f"the processes do not do the same ({ways})")
        return [word.message for word in said]

    def _tell(self, error: BaseException) -> None:
        """Let all others fail too. Raises the failure of another process, if it goes first."""
        try:
            said = self._words(_Word("failure", _Message(), _Failure.of(error, self.rank)))
        except OtherProcessError:
            return  # there is nobody left to tell
        self._failure_told = True
        first = next(word.failure for word in said if word.failure is not None)
        if first.rank != self.rank:
            raise first.as_error() from error

    def _words(self, word: _Word) -> list[_Word]:
        from torch.distributed import all_gather_object

        said = [word] * self.count
        with self._exchange(), _noticing_the_end():
            all_gather_object(said, word)
        return said

    def _broadcast(self, message: _Message, mine: list[Tensor], rank: int) -> list[Tensor]:
        """The tensors that go with ``message`` of process ``rank``; ``mine`` are of this one."""
        from torch.distributed import broadcast

        tensors = mine if rank == self.rank else message.empty(self._device)
        for tensor in tensors:
            if tensor.numel():
                with _noticing_the_end():
                    # As bytes: not every transport knows every dtype.
                    broadcast(tensor.view(-1).view(torch.uint8), rank)
        return tensors

    def _wait_for_all(self) -> None:
        """Until each has tidied up: whoever ends first takes the others with it."""
        from torch.distributed import all_gather_object

        try:
            all_gather_object([None] * self.count, None)
        except RuntimeError:  # it ended without a word
            self._in_step = False

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Whoever leaves an exchange half-way can tell the others no more, but by ending."""
        self._in_step = False
        yield
        self._in_step = True


@dataclass(frozen=True)
class _MeetingPlace:
    """Where processes find one another, and how often they have met before: each time anew."""

    store: Store
    times: Iterator[int]


@cache
def _meeting_place() -> _MeetingPlace:
    """That of this process, opened once: a second store on its port could be taken for the first.

    Environment variables say where it is, as torchrun sets them.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
    return _MeetingPlace(store, count())


@contextmanager
def _noticing_the_end() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessError(
            "another process of this run has ended; the same command goes on from here"
        ) from error


def shares_of(costs: Sequence[float], count: int) -> list[list[int]]:
    """The items that each of ``count`` processes does: the dearest first, to whom has least."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        rank = loads.index(min(loads))
        shares[rank].append(number)
        loads[rank] += costs[number]
    return [sorted(share) for share in shares]


# --- what is said ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Message:
    """A value, pickled but for its tensors; dtype and shape of each, and whether it is on a GPU."""

    value: bytes = b""
    tensors: tuple[tuple[torch.dtype, tuple[int, ...], bool], ...] = ()

    def empty(self, device: torch.device) -> list[Tensor]:
        """Room for the tensors; ``device`` is that of this process."""
        return [
            torch.empty(shape, dtype=dtype, device=device if on_device else "cpu")
            for dtype, shape, on_device in self.tensors
        ]


@dataclass(frozen=True)
class _Failure:
    """What ended process ``rank``: something to mend, Ctrl-C, or a bug (it shows where)."""

    rank: int
    kind: Literal["to mend", "interrupt", "bug"]
    text: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> _Failure:
        if isinstance(error, QplugError):
            return cls(rank, "to mend", str(error))
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, "interrupt", "")
        return cls(rank, "bug", f"{type(error).__name__}: {error}")

    def as_error(self) -> BaseException:
        """What another process raises for it."""
        if self.kind == "to mend":
            return RelayedError(self.text)
        if self.kind == "interrupt":
            return KeyboardInterrupt()
        return OtherProcessError(f"process {self.rank} broke: {self.text}")


@dataclass(frozen=True)
class _Word:
    """What each process says first in an exchange: which one it is at, or that it has failed."""

    what: str
    message: _Message
    failure: _Failure | None = None


@dataclass(frozen=True)
class _Packed:
    message: _Message = field(default_factory=_Message)
    tensors: list[Tensor] = field(default_factory=list)


def _pack(value: object) -> _Packed:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    forms = tuple((t.dtype, tuple(t.shape), t.device.type != "cpu") for t in pickler.tensors)
    return _Packed(_Message(file.getvalue(), forms), pickler.tensors)


def _unpack(message: _Message, tensors: Sequence[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(message.value), tensors).load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and keeps them beside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        # Contiguous on all processes alike: strides decide how sums are taken.
        self.tensors.append(value.detach().contiguous())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):  # of what this run's own processes have said
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
