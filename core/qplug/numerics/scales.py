"""Scales and zero points of weights, and the ranges that they cover."""

from __future__ import annotations

import torch
from torch import Tensor

from qplug.api import Linear
from qplug.api.groups import (
    GROUP_AXES,
    in_groups,
    out_of_groups,
    row_scales,
    spread_scales,
)
from qplug.api.scheme import (
    E8M0_SCALES,
    QuantArgs,
    Scheme,
)
from qplug.errors import QplugError
from qplug.numerics.chunks import in_chunks
from qplug.numerics.scale_formats import (
    as_stored,
    covering_global_scale,
    largest_code,
    power_of_two,
)


def scale_of(linear: Linear) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points chosen for ``linear``; if there are none, those that cover it."""
    if linear.scale is not None:
        return linear.scale, linear.zero
    return minmax_scale(linear.weight, linear.args, linear.global_scale)


def global_scale_of(linear: Linear) -> Tensor | None:
    """The global scale of ``linear``, float32 ``[1]``; None if its scales have one level.

    Where none was chosen, the smallest one that covers the weight.
    """
    if not linear.args.two_level or linear.global_scale is not None:
        return linear.global_scale
    return covering_global_scale(linear.weight.abs().amax().float(), linear.args)


def minmax_scale(
    weight: Tensor, args: QuantArgs, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points if ``args`` is asymmetric, that cover ``weight: [out, in]``.

    Scales: float32 ``args.scale_shape``, positive, exact in ``args.scale_dtype``; e4m3 scales are
    multiples of ``global_scale``, by default the one that covers ``weight``. Zero points: uint8 of
    the same shape. Raises QplugError as ``weight_range`` does.
    """
    return range_scale(*weight_range(weight, args), args, global_scale)


def weight_range(weight: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor]:
    """The least and the greatest of zero and the weights under each scale.

    Both are float32 ``args.scale_shape``. Raises QplugError if a weight is NaN or infinite, or if
    groups do not divide the width.
    """
    check_width(weight.shape[1], args)
    low = torch.empty(row_scales(weight, args), device=weight.device)
    high = torch.empty_like(low)
    for rows, groups in in_chunks(weight, args):
        low[rows], high[rows] = groups.amin(GROUP_AXES), groups.amax(GROUP_AXES)
    if not torch.isfinite(high - low).all():
        raise QplugError("the weight has NaN or infinite values")
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    if args.strategy == "tensor":
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    return low, high


def range_scale(
    low: Tensor, high: Tensor, args: QuantArgs, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points (None if symmetric) of ranges from ``low <= 0`` to ``high >= 0``.

    ``global_scale``: ``[1]``, if scales have two levels; by default one that covers all ranges.
    """
    if args.symmetric:
        peak = torch.maximum(-low, high)
        if args.scale_dtype == E8M0_SCALES:
            return power_of_two(peak, args), None
        return as_stored(peak / largest_code(args), args, global_scale), None
    top = args.code_range[1]
    scale = as_stored((high - low) / top, args)
    return scale, (-low / scale).round_().clamp_(0, top).to(torch.uint8)


def clip_to_scale(weight: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs) -> Tensor:
    """``weight: [out, in]``, float32, clipped in place to the ranges of its scales.

    ``minmax_scale`` of the result gives the same scales again where a weight reached the range.
    """
    groups, spread = in_groups(weight, args), scale.expand(row_scales(weight, args))
    top = largest_code(args) if args.symmetric else args.code_range[1]
    low = torch.full_like(spread, -top) if zero is None else -zero.float().expand(spread.shape)
    high = torch.full_like(spread, top) if zero is None else top + low
    cut = torch.clamp(groups, spread_scales(low * spread), spread_scales(high * spread))
    return weight.copy_(out_of_groups(cut, weight.shape[1], weight.shape[0]))


def column_scales(
    scale: Tensor, zero: Tensor | None, args: QuantArgs, columns: Tensor, rows: int
) -> tuple[Tensor, Tensor | None]:
    """The scale and zero point of each weight in ``columns`` of a matrix with ``rows`` rows.

    ``columns``: int64 ``[n]``. Returns float32 ``[n, rows]``, contiguous. Several matrices side by
    side have a leading axis in all tensors.
    """
    tall, wide = args.block or (1, args.group_size)
    places = columns // wide if wide else torch.zeros_like(columns)

    def spread(values: Tensor) -> Tensor:
        index = places[..., None].expand(*places.shape, values.shape[-2])
        picked = values.mT.gather(-2, index).float()
        if args.strategy == "tensor":
            return picked.expand(*places.shape, rows).contiguous()
        return picked.repeat_interleave(tall, dim=-1)[..., :rows].contiguous()

    return spread(scale), None if zero is None else spread(zero)


def check_width(width: int, args: QuantArgs) -> None:
    """Raises QplugError if groups of ``args`` do not divide rows of ``width`` weights."""
    if args.group_size is not None and width % args.group_size:
        raise QplugError(f"groups of {args.group_size} do not divide its width, {width}")


def check_widths(name: str, width: int, scheme: Scheme) -> None:
    """Raises QplugError if groups of weights or of inputs do not divide the width of ``name``."""
    for args, advice in (
        (scheme.weights, "choose another --group-size"),
        (scheme.activations, "choose a --scheme without groups of inputs, or --ignore it"),
    ):
        try:
            if args is not None:
                check_width(width, args)
        except QplugError as error:
            raise QplugError(f"{name}: {error}; {advice}") from None
