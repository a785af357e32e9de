"""Layers that are alike, such as the experts of a layer, computed side by side.

A step on one small matrix takes as long as a step on a dozen of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor

from qplug.api import InputGroup, QuantizedWeight
from qplug.api.groups import row_scales, row_step

#: Values of the largest matrix of each layer, in layers that are worked on at a time. Those of a
#: CPU stay in the cache of a core; a GPU waits for launches if they are few.
ROOM = {"cuda": 1 << 28, "cpu": 1 << 20}


def side_by_side(groups: Sequence[InputGroup], processes: int = 1) -> list[list[InputGroup]]:
    """``groups``, in order, with neighbours that are alike in one list.

    A list has as many as are worked on at a time. With several ``processes``, neighbours that are
    alike are divided into lists of about one length, as many for each process. Groups are alike if
    their linears have the same shapes and grids, in order, and if all of them or none have scales,
    and tokens.
    """
    found: list[list[InputGroup]] = []
    for _, neighbours in groupby(groups, key=_likeness):
        alike = [*neighbours]
        room = ROOM.get(alike[0].mean.device.type, 0)
        size = max(alike[0].width ** 2, *(linear.weight.numel() for linear in alike[0].linears))
        starts = [*range(0, len(alike), max(1, room // size))]
        if processes > 1:
            lists = min(len(alike), -(-len(starts) // processes) * processes)
            starts = [number * len(alike) // lists for number in range(lists)]
        found += [alike[start:end] for start, end in pairwise([*starts, len(alike)])]
    return found


def parts_side_by_side(
    groups: Sequence[InputGroup], processes: int = 1
) -> Iterator[tuple[list[InputGroup], InputGroup]]:
    """Yields the parts of ``groups`` whose linears see the same tokens, as ``side_by_side`` does.

    With them comes the group whose parts they are, or the first of several groups of experts.
    """
    for experts, same in groupby(groups, key=lambda group: group.experts or id(group)):
        wholes = [*same]
        parts = wholes if isinstance(experts, str) else wholes[0].by_tokens
        for alike in side_by_side(parts, processes):
            yield alike, wholes[0]


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


def of_one_shape(weights: Sequence[Tensor]) -> list[list[int]]:
    """The places of ``weights`` of one shape and dtype, in lists.

    A list has half as many as in ``side_by_side``: more copies are made of them.
    """
    places: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for place, weight in enumerate(weights):
        places.setdefault((weight.shape, weight.dtype), []).append(place)
    found = []
    for alike in places.values():
        first = weights[alike[0]]
        size = max(1, ROOM.get(first.device.type, 0) // 2 // max(1, first.numel()))
        found += [alike[start : start + size] for start in range(0, len(alike), size)]
    return found


def as_one(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """``weights`` of one shape, one below the other: codes ``[n * out, in]``.

    Each row has scales of its own. None if the weights have different grids, or scales that rows of
    two weights would share.
    """
    first = weights[0]
    args, rows = first.args, first.codes.shape[0]
    alike = all(w.args == args and (w.zero is None) == (first.zero is None) for w in weights)
    if not alike or rows % row_step(args):
        return None
    shape = row_scales(first.codes, args)
    zeros = [weight.zero.expand(shape) for weight in weights if weight.zero is not None]
    return QuantizedWeight(
        together([weight.codes for weight in weights]).flatten(0, 1),
        together([weight.scale.expand(shape) for weight in weights]).flatten(0, 1),
        together(zeros).flatten(0, 1) if zeros else None,
        args,
    )


def copied(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    alike: Sequence[Sequence[str]],
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Copies of ``tensors`` in ``dtype`` on ``device``, by default their own.

    Those of the names in a list of ``alike`` follow one another in memory, if all are there, of one
    shape and dtype; then ``together`` copies none of them. Others that are right stay uncopied if
    ``dtype`` is None.
    """
    copies: dict[str, Tensor] = {}
    for names in alike:
        own = [tensors[name] for name in names if name in tensors]
        if len(own) < len(names) or len({(one.shape, one.dtype, one.device) for one in own}) > 1:
            continue
        whole = torch.empty(
            len(own), *own[0].shape, dtype=dtype or own[0].dtype, device=device or own[0].device
        )
        if whole.device == own[0].device:
            whole.copy_(together(own))
        else:
            for part, tensor in zip(whole, own, strict=True):
                part.copy_(tensor, non_blocking=True)
        copies.update(zip(names, whole, strict=True))
    return {
        name: copies[name]
        if name in copies
        else tensor.to(
            device or tensor.device,
            dtype or tensor.dtype,
            non_blocking=True,
            copy=dtype is not None,
        )
        for name, tensor in tensors.items()
    }


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
