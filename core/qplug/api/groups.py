"""Weights cut into the groups that share a scale, and codes multiplied out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug.api.block import QuantizedWeight
from qplug.api.scheme import QuantArgs

if TYPE_CHECKING:
    from torch import Tensor


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The float32 weight ``[out, in]`` that codes stand for: ``(codes - zero) * scale``."""
    return dequantize_with(weight.codes, weight.scale, weight.zero, weight.args)


def dequantize_with(codes: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs) -> Tensor:
    """``dequantize`` of codes ``[out, in]`` that are not yet a QuantizedWeight."""
    values = codes.float()
    scale = scale.expand(row_scales(values, args))
    groups = in_groups(values, args)
    if zero is not None:
        groups = groups - spread_scales(zero.expand(scale.shape))
    return out_of_groups(groups * spread_scales(scale), values.shape[1], values.shape[0])


GROUP_AXES = (1, 3)


def row_step(args: QuantArgs) -> int:
    return args.block[0] if args.block else 1


def row_scales(weight: Tensor, args: QuantArgs) -> tuple[int, int]:
    """The shape of scales, one for each row step at least (``tensor`` is worked on row by row)."""
    if args.strategy == "tensor":
        return weight.shape[0], 1
    return args.scale_shape((weight.shape[0], weight.shape[1]))


def per_row_scale(scale: Tensor, weight: Tensor, args: QuantArgs) -> Tensor:
    """``scale: args.scale_shape`` as ``[row step, 1, group, 1]``, to go with ``in_groups``."""
    return spread_scales(scale.expand(row_scales(weight, args)))


def in_groups(part: Tensor, args: QuantArgs) -> Tensor:
    """``[rows, in]`` as ``[row step, rows, group, columns]``; ragged blocks are filled with 0."""
    if args.block:
        tall, wide = args.block
        down, right = -part.shape[0] % tall, -part.shape[1] % wide
        if down or right:
            whole = part.new_zeros((part.shape[0] + down, part.shape[1] + right))
            whole[: part.shape[0], : part.shape[1]] = part
            part = whole
        return part.view(part.shape[0] // tall, tall, part.shape[1] // wide, wide)
    return part.view(part.shape[0], 1, -1, args.group_size or part.shape[1])


def out_of_groups(groups: Tensor, width: int, rows: int) -> Tensor:
    """The inverse of ``in_groups``: ``[rows, width]``."""
    return groups.flatten(2).flatten(0, 1)[:rows, :width]


def spread_scales(scale: Tensor) -> Tensor:
    return scale[:, None, :, None]
