"""Splits weights into the groups that share a scale, and turns codes back into float weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug.api.block import QuantizedWeight
from qplug.api.scheme import QuantArgs

if TYPE_CHECKING:
    from torch import Tensor


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Returns the float32 weight ``[out, in]`` of the codes, ``(codes - zero) * scale``."""
    return dequantize_with(weight.codes, weight.scale, weight.zero, weight.args)


def dequantize_with(codes: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs) -> Tensor:
    """Returns the same as ``dequantize`` for ``codes`` ``[out, in]`` and their scales."""
    values = codes.float()
    scale = scale.expand(row_scales(values, args))
    groups = in_groups(values, args)
    if zero is not None:
        groups = groups - spread_scales(zero.expand(scale.shape))
    return out_of_groups(groups * spread_scales(scale), values.shape[1], values.shape[0])


GROUP_AXES = (1, 3)


def row_step(args: QuantArgs) -> int:
    """Returns the number of rows that one row of scales is for: the height of a block, or 1."""
    return args.block[0] if args.block else 1


def row_scales(weight: Tensor, args: QuantArgs) -> tuple[int, int]:
    """Returns the shape of scales ``[row steps, groups]`` of ``weight`` ``[out, in]``.

    It is ``args.scale_shape``, except that a single scale (``tensor``) is repeated for every row,
    so that a caller can work row by row.
    """
    if args.strategy == "tensor":
        return weight.shape[0], 1
    return args.scale_shape((weight.shape[0], weight.shape[1]))


def per_row_scale(scale: Tensor, weight: Tensor, args: QuantArgs) -> Tensor:
    """Returns ``scale: args.scale_shape`` as ``[row steps, 1, groups, 1]``, like ``in_groups``."""
    return spread_scales(scale.expand(row_scales(weight, args)))


def in_groups(part: Tensor, args: QuantArgs) -> Tensor:
    """Returns ``part`` as ``[row steps, rows of a step, groups, columns]``.

    ``part`` are rows of a weight, ``[rows, in]``. Blocks that reach over the edge of the matrix are
    filled with zeros.
    """
    if args.block:
        tall, wide = args.block
        down, right = -part.shape[0] % tall, -part.shape[1] % wide
        if down or right:
            padded = part.new_zeros((part.shape[0] + down, part.shape[1] + right))
            padded[: part.shape[0], : part.shape[1]] = part
            part = padded
        return part.view(part.shape[0] // tall, tall, part.shape[1] // wide, wide)
    return part.view(part.shape[0], 1, -1, args.group_size or part.shape[1])


def out_of_groups(groups: Tensor, width: int, rows: int) -> Tensor:
    """Returns the result of ``in_groups`` as a matrix ``[rows, width]`` again, without padding."""
    return groups.flatten(2).flatten(0, 1)[:rows, :width]


def spread_scales(scale: Tensor) -> Tensor:
    """Returns ``scale`` ``[row steps, groups]`` as ``[row steps, 1, groups, 1]``."""
    return scale[:, None, :, None]
