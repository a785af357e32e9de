"""Reads stored tensors into memory, several at a time, and their checksums with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING, TypeAlias

import torch

from qplug.api import StoredTensor
from qplug.checkpoint.stacked import CutTensor
from qplug.checkpoint.tensor_file import FileTensor

if TYPE_CHECKING:
    from torch import Tensor

#: Called with the name of a stored tensor and its value, in the thread that has read it.
See: TypeAlias = "Callable[[str, Tensor], None]"

#: Threads that read at once: one thread is slower than a disk, since it also copies the bytes.
READERS = 4


def is_plain(tensor: StoredTensor) -> bool:
    """Whether reading ``tensor`` returns stored bytes as they are, and computes nothing."""
    return isinstance(tensor, FileTensor | CutTensor)


def into_memory(tensor: StoredTensor, *, page_locked: bool) -> Tensor:
    """Returns a copy of ``tensor`` on the CPU, unless reading computes the tensor on a GPU.

    ``page_locked``: in memory from which a GPU copies at full speed. torch keeps such memory and
    uses it for the next tensor, so that it is allocated once.
    """
    if page_locked and isinstance(tensor, FileTensor):
        return tensor.read_into(torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True))
    value = tensor.read()
    return value.pin_memory() if page_locked and not value.is_cuda else value


def all_into_memory(
    tensors: Mapping[str, StoredTensor],
    threads: Executor,
    *,
    page_locked: bool,
    see: See | None = None,
) -> dict[str, Tensor]:
    """Returns ``into_memory`` of ``tensors``, by name.

    Plain tensors are read by ``threads``, at once, which call ``see`` with the name and the value.
    Tensors that are computed are read one after the other, since each computation needs memory of
    its own.
    """

    def read(name: str, tensor: StoredTensor) -> Tensor:
        value = into_memory(tensor, page_locked=page_locked)
        if see is not None:
            see(name, value)
        return value

    plain = {
        name: threads.submit(read, name, tensor)
        for name, tensor in tensors.items()
        if is_plain(tensor)
    }
    return {
        name: plain[name].result()
        if name in plain
        else into_memory(tensor, page_locked=page_locked)
        for name, tensor in tensors.items()
    }


def nbytes_of(tensors: Iterable[StoredTensor]) -> int:
    """Returns the bytes of ``tensors`` together."""
    return sum(tensor.nbytes for tensor in tensors)
