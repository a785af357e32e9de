"""GPU kernels for ``straight_through``: a weight and its gradient are read once for each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplug.api.scheme import QuantArgs
from qplug.numerics.scale_formats import SMALLEST, largest_code

#: Weights in the tile of one program, unless a group is longer.
_TILE = 4096

_STORED = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


# Triton accepts no annotations but its own.
@triton.jit
def _range_of(  # type: ignore[no-untyped-def]
    values, low_part, high_part, inverse_top, least, SYMMETRIC: tl.constexpr, STORED: tl.constexpr
):
    """The ends of each row of ``values``, the kept ends, the scale, and the exact zero point."""
    low = tl.minimum(tl.min(values, axis=1), 0.0)
    high = tl.maximum(tl.max(values, axis=1), 0.0)
    low_end, high_end = low * low_part, high * high_part
    # torch multiplies a tensor on a GPU by the inverse of a number that it is divided by.
    reach = tl.maximum(-low_end, high_end) if SYMMETRIC else high_end - low_end
    scale = tl.maximum((reach * inverse_top).to(STORED).to(tl.float32), least)
    return low, high, low_end, high_end, scale, tl.math.div_rn(-low_end, scale)


@triton.jit
def _nearest(values):  # type: ignore[no-untyped-def]
    """Rounds to nearest, ties to even, as torch does: adds and subtracts 1.5 * 2^23."""
    return (tl.minimum(tl.maximum(values, -4194304.0), 4194304.0) + 12582912.0) - 12582912.0


@triton.jit(do_not_specialize=["rows", "groups"])
def _round(  # type: ignore[no-untyped-def]
    weight,
    low_parts,
    high_parts,
    rounded,
    rows,
    width,
    groups,
    size,
    inverse_top,
    first,
    last,
    least,
    SYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program rounds ``ROWS`` rows of one group of ``size`` columns."""
    group = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, GROUP)
    place = row[:, None] * width + group * size + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < size)
    values = tl.load(weight + place, mask=inside, other=0.0)
    here = row * groups + group
    low_part = tl.load(low_parts + here, mask=row < rows, other=1.0)
    high_part = tl.load(high_parts + here, mask=row < rows, other=1.0)
    _, _, _, _, scale, exact_zero = _range_of(
        values, low_part, high_part, inverse_top, least, SYMMETRIC, STORED
    )
    code = _nearest(tl.math.div_rn(values, tl.broadcast_to(scale[:, None], (ROWS, GROUP))))
    if SYMMETRIC:
        code = tl.minimum(tl.maximum(code, first), last)
    else:
        zero = tl.minimum(tl.maximum(_nearest(exact_zero), first), last)[:, None]
        code = tl.minimum(tl.maximum(code + zero, first), last) - zero
    result = code * scale[:, None]
    tl.store(rounded + place, result.to(rounded.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "groups"])
def _round_backward(  # type: ignore[no-untyped-def]
    weight,
    low_parts,
    high_parts,
    grads,
    of_weight,
    of_low_parts,
    of_high_parts,
    rows,
    width,
    groups,
    size,
    inverse_top,
    first,
    last,
    least,
    SYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program computes the gradients of ``ROWS`` rows of one group of ``size`` columns."""
    group = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, GROUP)
    place = row[:, None] * width + group * size + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < size)
    values = tl.load(weight + place, mask=inside, other=0.0)
    grad = tl.load(grads + place, mask=inside, other=0.0).to(tl.float32)
    here = row * groups + group
    low_part = tl.load(low_parts + here, mask=row < rows, other=1.0)
    high_part = tl.load(high_parts + here, mask=row < rows, other=1.0)
    low, high, low_end, high_end, scale, exact_zero = _range_of(
        values, low_part, high_part, inverse_top, least, SYMMETRIC, STORED
    )
    quotient = tl.math.div_rn(values, tl.broadcast_to(scale[:, None], (ROWS, GROUP)))
    code = _nearest(quotient)
    if SYMMETRIC:
        unclipped = (code >= first) & (code <= last)
        code = tl.minimum(tl.maximum(code, first), last)
        through = tl.where(unclipped, grad, 0.0)
        of_scale = tl.sum(code * grad - quotient * through, axis=1)
        of_end = of_scale * inverse_top
        # Ends that are equally far share the gradient, as torch.maximum does.
        share = tl.where(-low_end > high_end, 1.0, tl.where(-low_end < high_end, 0.0, 0.5))
        of_low_end, of_high_end = -of_end * share, of_end * (1.0 - share)
    else:
        zero = _nearest(exact_zero)
        movable = (zero >= first) & (zero <= last)
        zero = tl.minimum(tl.maximum(zero, first), last)
        code += zero[:, None]
        unclipped = (code >= first) & (code <= last)
        code = tl.minimum(tl.maximum(code, first), last) - zero[:, None]
        through = tl.where(unclipped, grad, 0.0)
        of_scale = tl.sum(code * grad - quotient * through, axis=1)
        of_zero = tl.sum((through - grad) * scale[:, None], axis=1)
        of_zero = tl.where(movable, of_zero, 0.0)
        of_scale += of_zero * (-exact_zero / scale)
        of_end = of_scale * inverse_top
        of_low_end, of_high_end = -of_end - of_zero / scale, of_end
    of_low_part, of_high_part = of_low_end * low, of_high_end * high
    if SYMMETRIC:
        tl.store(of_low_parts + here, of_low_part + of_high_part, mask=row < rows)
    else:
        tl.store(of_low_parts + here, of_low_part, mask=row < rows)
        tl.store(of_high_parts + here, of_high_part, mask=row < rows)
    if WANTS_WEIGHT:
        through += _of_extreme(values, low, of_low_end * low_part, inside)
        through += _of_extreme(values, high, of_high_end * high_part, inside)
        tl.store(of_weight + place, through, mask=inside)


@triton.jit
def _of_extreme(values, extreme, grad, inside):  # type: ignore[no-untyped-def]
    """The gradients of ``values`` through the ``extreme`` of each row, which has ``grad``.

    Equal extremes share it. If all of a row are on the same side of 0, the range ends at 0, which
    is none of them.
    """
    here = inside & (values == extreme[:, None])
    count = tl.maximum(tl.sum(here.to(tl.float32), axis=1), 1.0)
    return tl.where(here, (grad / count)[:, None], 0.0)


def round_in_range_on_gpu(
    weight: Tensor, parts: Sequence[Tensor], args: QuantArgs, dtype: torch.dtype
) -> Tensor:
    """``straight_through.round_in_range`` as one kernel, and another for the gradients."""
    rounded: Tensor = _RoundInRange.apply(  # type: ignore[no-untyped-call]
        weight, parts[0], None if args.symmetric else parts[1], args, dtype
    )
    return rounded


class _RoundInRange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        low_part: Tensor,
        high_part: Tensor | None,
        args: QuantArgs,
        dtype: torch.dtype,
    ) -> Tensor:
        weight, low_part = weight.contiguous(), low_part.contiguous()
        high_part = low_part if high_part is None else high_part.contiguous()
        ctx.save_for_backward(weight, low_part, high_part)
        ctx.args = args
        rounded = torch.empty_like(weight, dtype=dtype)
        grid, numbers, constants = _launch(weight, args)
        _round[grid](weight, low_part, high_part, rounded, *numbers, **constants)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, low_part, high_part = ctx.saved_tensors
        args: QuantArgs = ctx.args
        wants_weight = ctx.needs_input_grad[0]
        of_weight = torch.empty_like(weight) if wants_weight else None
        of_low = torch.empty_like(low_part)
        of_high = None if args.symmetric else torch.empty_like(high_part)
        grid, numbers, constants = _launch(weight, args)
        _round_backward[grid](
            weight,
            low_part,
            high_part,
            grads[0].contiguous(),
            of_low if of_weight is None else of_weight,
            of_low,
            of_low if of_high is None else of_high,
            *numbers,
            **constants,
            WANTS_WEIGHT=wants_weight,
        )
        return of_weight, of_low, of_high, None, None


def _launch(
    weight: Tensor, args: QuantArgs
) -> tuple[tuple[int, int], tuple[float, ...], dict[str, Any]]:
    """The grid of programs, the numbers that both kernels take, and their constants."""
    rows, width = weight.shape
    size = args.group_size or width
    group = triton.next_power_of_2(size)
    at_once = max(1, _TILE // group)
    first, last = args.code_range
    top = largest_code(args) if args.symmetric else float(last)
    least = SMALLEST[args.scale_dtype]
    numbers = (rows, width, width // size, size, 1 / top, float(first), float(last), least)
    constants = {
        "SYMMETRIC": args.symmetric,
        "STORED": _STORED[args.scale_dtype],
        "GROUP": group,
        "ROWS": at_once,
        "num_warps": 4 if group <= _TILE else 16,
    }
    return (triton.cdiv(rows, at_once), width // size), numbers, constants
