"""A search for scales among those that a format can store, for floats of four bits.

A block of NVFP4 (16 weights) has a scale in e4m3, a block of MXFP4 (32 weights) a power of two. The
scale that just covers a block is a poor choice: the grid of e2m1 is coarse at its upper end (4, 6),
so that a wider or a narrower one often fits better ("Four Over Six", arXiv 2512.02010, tries ranges
up to 4 and up to 6). Here every scale that can be the best is tried, and errors are computed under
the scale as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qplug.api import Linear, QuantizedWeight
from qplug.api.scheme import E8M0_SCALES, FLOAT_MAX, FLOAT_STEP, FLOATS, QuantArgs
from qplug.numerics.rounding import nearest
from qplug.numerics.scale_formats import EXPONENT_BITS, SMALLEST, as_stored, largest_code
from qplug.numerics.scales import global_scale_of, minmax_scale

#: Steps from the covering scale to those that can be the best, the most frequent ones first: in
#: codes of e4m3, and in exponents.
_E4M3_STEPS = (0, 5, -1, 4, 1, 3, 6, -2, 2)
_E8M0_STEPS = (0, -1, 1)
#: The largest code of e4m3, whose successor is NaN. The code 0 is the scale 0.
_LAST_CODE = 126
#: Weights in one step of the search. On a CPU they and their copies stay in the cache of a core.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 24}


def has_stored_steps(args: QuantArgs) -> bool:
    """Whether scales are searched among all that can be stored, not as parts of a range."""
    return args.fixes_scales and args.bits < 8


def stored_candidates(
    peak: Tensor, args: QuantArgs, global_scale: Tensor | None, count: int | None = None
) -> Iterator[Tensor]:
    """Yields scales, shaped like ``peak``, that can be the best for groups of such magnitudes.

    ``peak``: float32, the largest magnitude of each group. The scale that covers it is the first.
    ``global_scale``: float32 ``[1]``, for scales of two levels. ``count``: how many are wanted, at
    most; by default all.
    """
    covering = as_stored(peak / largest_code(args), args, global_scale)
    if args.scale_dtype == E8M0_SCALES:
        for step in _E8M0_STEPS[:count]:
            yield (covering * 2.0**step).clamp_(min=SMALLEST[E8M0_SCALES])
        return
    assert global_scale is not None
    codes = (covering / global_scale).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
    for step in _E4M3_STEPS[:count]:
        moved = (codes + step).clamp_(1, _LAST_CODE).to(torch.uint8)
        yield moved.view(torch.float8_e4m3fn).float() * global_scale


def search_scale(linear: Linear) -> None:
    """Set ``linear.scale`` to the scales of least squared error, group by group.

    Raises QplugError as ``minmax_scale`` does. Nothing is set if the format does not prescribe its
    scales, if codes have 8 bits, or if ``linear`` has scales.
    """
    args = linear.args
    if linear.scale is not None or not has_stored_steps(args):
        return
    global_scale = global_scale_of(linear)
    covering, _ = minmax_scale(linear.weight, args, global_scale)
    size = args.group_size
    assert size is not None
    groups = linear.weight.reshape(-1, size)
    found = torch.empty(len(groups), device=groups.device)
    rows = max(1, _CHUNK.get(groups.device.type, 1 << 24) // size)
    for part, out in zip(groups.split(rows), found.split(rows), strict=True):
        sizes = part.float().abs().T.contiguous()  # [size, groups]: sums go down the columns
        out.copy_(_least(sizes, args, global_scale))
    linear.scale = found.view(covering.shape)


def closest(linear: Linear) -> QuantizedWeight:
    """The nearest codes of ``linear`` under the scales that ``search_scale`` finds.

    ``linear`` stays as it is. Where there is nothing to search, the result is ``nearest(linear)``.
    """
    copy = replace(linear)
    search_scale(copy)
    return nearest(copy)


def _least(sizes: Tensor, args: QuantArgs, global_scale: Tensor | None) -> Tensor:
    """The scales ``[groups]`` of least squared error for magnitudes ``sizes: [size, groups]``."""
    candidates = stored_candidates(sizes.amax(0), args, global_scale)
    best = next(candidates)
    least = _squared_error(sizes, best, args)
    for scale in candidates:
        error = _squared_error(sizes, scale, args)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best)
    return best


def _squared_error(sizes: Tensor, scale: Tensor, args: QuantArgs) -> Tensor:
    """The squared error ``[groups]`` of rounding ``sizes: [size, groups]`` under ``scale``.

    Of two equally near codes either may be taken: their errors are the same.
    """
    mantissa = FLOATS[args.dtype][1]
    ratio = sizes / scale
    # Without its mantissa, a ratio is the power of two at or below it: 2^mantissa steps of the
    # grid. Adding 2^(23 - mantissa) times that leaves no bits for anything smaller than a step.
    powers = (ratio.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    powers.clamp_(min=FLOAT_STEP[args.dtype] * 2**mantissa)
    shift = 2.0 ** (23 - mantissa)
    codes = torch.add(ratio, powers, alpha=shift).sub_(powers, alpha=shift)
    codes.clamp_(max=FLOAT_MAX[args.dtype])
    return codes.sub_(ratio).square_().sum(0) * scale.square()
