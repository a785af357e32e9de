"""Large tensors that are equal in the calls of several batches, kept once.

A model makes a mask for each batch, and the masks of windows of one length are equal. The mask of a
window of 32,768 tokens has 1 GiB.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: Bytes of a tensor from which on looking for an equal one pays.
_LEAST = 1 << 20


class SharedTensors:
    """Remembers large tensors, and gives the memory of an equal one to each that follows."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Lets each of ``tensors`` that equals an earlier one take its memory.

        The model's own frames refer to the tensors, so their memory is replaced and not they.
        """
        for tensor in tensors:
            if tensor._base is not None:  # a view, which keeps the memory of its base
                self._share(tensor._base)
            self._share(tensor)

    def _share(self, tensor: Tensor) -> None:
        if tensor.numel() * tensor.element_size() < _LEAST:
            return
        for seen in self._seen:
            if tensor is seen:
                return
            if _alike(tensor, seen) and torch.equal(tensor, seen):
                tensor.data = seen
                return
        self._seen.append(tensor)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype, one.device) == (
        *(other.shape, other.stride(), other.dtype, other.device),
    )
