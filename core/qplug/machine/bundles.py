"""Tensors that travel together: an exchange of many small tensors costs a wait for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Bytes of a tensor that travels with others, and of all that travel at once.
SMALL, LARGEST = 4 << 20, 64 << 20
_ALIGNED = 16  # bytes, so that parts of a bundle can be viewed as any dtype


def bundles(sizes: Sequence[tuple[int, object]]) -> list[list[int]]:
    """The places of the tensors that travel together, by bundle.

    ``sizes``: of each tensor its bytes, and a key; tensors of one key may travel together. Tensors
    without bytes are in no bundle. All processes come to the same bundles from the same sizes.
    """
    made: list[list[int]] = []
    filling: dict[object, tuple[list[int], int]] = {}
    for place, (size, key) in enumerate(sizes):
        if not size:
            continue
        if size > SMALL:
            made.append([place])
            continue
        bundle, filled = filling.get(key, ([], 0))
        if not bundle or filled + _aligned(size) > LARGEST:
            bundle, filled = [], 0
            made.append(bundle)
        bundle.append(place)
        filling[key] = bundle, filled + _aligned(size)
    return made


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous ``tensor``: uint8 ``[bytes]``, a view."""
    return tensor.view(-1).view(torch.uint8)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all ``tensors``, which are contiguous and on one device, each at its place."""
    total = sum(_aligned(tensor.nbytes) for tensor in tensors)
    together = torch.zeros(total, dtype=torch.uint8, device=tensors[0].device)
    for tensor, part in zip(tensors, _parts(together, tensors), strict=True):
        part.copy_(as_bytes(tensor))
    return together


def taken_apart(together: Tensor, into: Sequence[Tensor]) -> None:
    """Copies the bytes of ``joined`` tensors ``into`` tensors of their dtypes and shapes."""
    for tensor, part in zip(into, _parts(together, into), strict=True):
        as_bytes(tensor).copy_(part)


def _parts(together: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts, start = [], 0
    for tensor in tensors:
        parts.append(together[start : start + tensor.nbytes])
        start += _aligned(tensor.nbytes)
    return parts


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
