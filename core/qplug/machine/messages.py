"""What processes send one another: values with tensors, and failures."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from qplug.errors import CtrlC, OtherProcessError, QplugError, RelayedError


@dataclass(frozen=True)
class Message:
    """A pickled ``value``, and for each of its tensors dtype, shape, and whether it is on a GPU."""

    value: bytes = b""
    tensors: tuple[tuple[torch.dtype, tuple[int, ...], bool], ...] = ()

    def empty_tensors(self, device: torch.device) -> list[Tensor]:
        """Memory to receive the tensors; those on a GPU go to ``device``, of this process."""
        return [
            torch.empty(shape, dtype=dtype, device=device if on_gpu else "cpu")
            for dtype, shape, on_gpu in self.tensors
        ]


@dataclass(frozen=True)
class Failure:
    """Why process ``rank`` stopped: an error that users can mend, Ctrl-C, or a bug."""

    rank: int
    kind: Literal["to mend", "interrupt", "bug"]
    text: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """The failure of process ``rank`` for ``error``."""
        if isinstance(error, QplugError):
            return cls(rank, "to mend", str(error))
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, "interrupt", "")
        return cls(rank, "bug", f"{type(error).__name__}: {error}")

    def as_error(self) -> BaseException:
        """The error that the other processes raise for it."""
        if self.kind == "to mend":
            return RelayedError(self.text)
        if self.kind == "interrupt":
            return CtrlC()
        return OtherProcessError(f"process {self.rank} broke: {self.text}")


@dataclass(frozen=True)
class Announcement:
    """What each process sends first in an exchange: the exchange it is at, or its failure."""

    exchange: str
    message: Message
    failure: Failure | None = None


@dataclass(frozen=True)
class Packed:
    """A message, and the tensors that are sent after it, contiguous."""

    message: Message = field(default_factory=Message)
    tensors: list[Tensor] = field(default_factory=list)


def pack(value: object) -> Packed:
    """``value``, which pickle takes, as a message and its tensors."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    forms = tuple((t.dtype, tuple(t.shape), t.device.type != "cpu") for t in pickler.tensors)
    return Packed(Message(file.getvalue(), forms), pickler.tensors)


def unpack(message: Message, tensors: Sequence[Tensor]) -> Any:
    """The inverse of ``pack``."""
    return _Unpickler(io.BytesIO(message.value), tensors).load()


class _Pickler(pickle.Pickler):
    """Pickles everything but tensors, which it collects in ``tensors``."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        # Contiguous on all processes alike, since strides decide in which order sums are taken.
        self.tensors.append(value.detach().contiguous())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts tensors back. It only reads bytes that processes of the same run have sent."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
