"""Layers that are alike, such as the experts of a layer, computed side by side.

A GPU takes as long for one of many small matrices as for a dozen of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qplug.api import InputGroup

#: Values of a Gram matrix, and of weights, in matrices that are worked on at a time.
_ROOM = {"cuda": 1 << 26}


def side_by_side(groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """``groups``, in order, with neighbours that are alike in one list.

    A list has as many as a GPU computes at a time; on a CPU each group is alone. Groups are alike
    if their linears have the same shapes and grids, in order, and if all of them or none have
    scales, and tokens.
    """
    found: list[list[InputGroup]] = []
    for group in groups:
        room = _ROOM.get(group.mean.device.type, 0)
        size = max(group.width**2, *(linear.weight.numel() for linear in group.linears))
        last = found[-1] if found else []
        if last and _likeness(last[0]) == _likeness(group) and (len(last) + 1) * size <= room:
            last.append(group)
        else:
            found.append([group])
    return found


def _likeness(group: InputGroup) -> tuple[object, ...]:
    linears = (
        (
            linear.weight.shape,
            linear.args,
            linear.activations,
            linear.scale is None,
            linear.zero is None,
            linear.global_scale is None,
        )
        for linear in group.linears
    )
    return (group.width, group.tokens > 0, group.drift is None, len(group.by_expert), *linears)


def together(tensors: Sequence[Tensor]) -> Tensor:
    """``tensors``, each of one shape, as one tensor with a leading axis: ``[n, ...]``.

    The result is a view if they follow one another in memory, as ``apart`` leaves them; else it is
    a copy.
    """
    first = tensors[0]
    step, start = first.numel(), first.storage_offset()
    address = first.untyped_storage().data_ptr()
    are_neighbours = all(
        tensor.untyped_storage().data_ptr() == address
        and tensor.storage_offset() == start + number * step
        and tensor.shape == first.shape
        and tensor.dtype == first.dtype
        and tensor.is_contiguous()
        for number, tensor in enumerate(tensors)
    )
    if not are_neighbours or first.is_meta:
        return torch.stack([*tensors])
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()), start)
