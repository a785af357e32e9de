"""GPU kernels for ``clipping``: each weight is read once, for any number of candidates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplug.api.scheme import QuantArgs

_ROWS = 64


# Triton accepts no annotations but its own.
@triton.jit(do_not_specialize=["rows", "groups", "candidates"])
def _clip_errors(  # type: ignore[no-untyped-def]
    weight,
    blocks,
    scales,
    zeros,
    errors,
    rows,
    width,
    groups,
    candidates,
    low,
    high,
    HAS_ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program handles ``ROWS`` rows of one group, with the group's block of the Gram matrix.

    ``rows`` are those of one matrix; candidates have the scales of all matrices, one after another.
    """
    group, matrix = tl.program_id(1), tl.program_id(2).to(tl.int64)
    weight += matrix * rows * width
    blocks += matrix * groups * GROUP * GROUP
    all_rows = tl.num_programs(2).to(tl.int64) * rows
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    column = tl.arange(0, GROUP)
    place = row[:, None] * width + group * GROUP + column[None, :]
    values = tl.load(weight + place, mask=inside[:, None], other=0.0)
    gram = tl.load(blocks + (group * GROUP + column[:, None]) * GROUP + column[None, :])
    for candidate in range(candidates):
        here = (candidate * all_rows + matrix * rows + row) * groups + group
        scale = tl.load(scales + here, mask=inside, other=1.0)[:, None]
        # Adding and subtracting 1.5 * 2^23 rounds to nearest, ties to even, as torch does.
        ratio = tl.math.div_rn(values, tl.broadcast_to(scale, (ROWS, GROUP)))
        ratio = tl.minimum(tl.maximum(ratio, -4194304.0), 4194304.0)
        code = (ratio + 12582912.0) - 12582912.0
        if HAS_ZERO:
            zero = tl.load(zeros + here, mask=inside, other=0).to(tl.float32)[:, None]
            code = tl.minimum(tl.maximum(code + zero, low), high) - zero
        else:
            code = tl.minimum(tl.maximum(code, low), high)
        difference = code * scale - values
        product = tl.dot(difference, gram, input_precision="tf32")
        tl.store(errors + here, tl.sum(product * difference, axis=1), mask=inside)


def clip_errors_on_gpu(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, blocks: Tensor, args: QuantArgs
) -> Tensor:
    """``clipping.clip_errors`` as one kernel; products are in TF32."""
    count, rows, width = weight.shape
    groups = blocks.shape[1]
    errors = torch.empty(scales.shape, device=weight.device)
    low, high = args.code_range
    _clip_errors[(triton.cdiv(rows, _ROWS), groups, count)](
        weight.contiguous(),
        blocks,
        scales,
        scales if zeros is None else zeros,
        errors,
        rows,
        width,
        groups,
        len(scales),
        float(low),
        float(high),
        HAS_ZERO=zeros is not None,
        GROUP=blocks.shape[2],
        ROWS=_ROWS,
        num_warps=4,
    )
    return errors


@triton.jit(do_not_specialize=["rows", "steps"])
def _scaled_differences(  # type: ignore[no-untyped-def]
    weight,
    column_scales,
    blocks,
    differences,
    rows,
    width,
    steps,
    largest,
    smallest,
    top,
    low,
    high,
    least,
    SYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program finds the range of least error for ``ROWS`` rows of one group of one matrix."""
    group, matrix = tl.program_id(1), tl.program_id(2).to(tl.int64)
    weight += matrix * rows * width
    differences += matrix * rows * width
    column_scales += matrix * width
    blocks += matrix * width * GROUP
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    column = tl.arange(0, GROUP)
    place = row[:, None] * width + group * GROUP + column[None, :]
    factor = tl.load(column_scales + group * GROUP + column)[None, :]
    values = tl.load(weight + place, mask=inside[:, None], other=0.0) * factor
    undone = 1.0 / factor
    gram = tl.load(blocks + (group * GROUP + column[:, None]) * GROUP + column[None, :])
    bottom = tl.minimum(tl.min(values, axis=1), 0.0)
    peak = tl.maximum(tl.max(values, axis=1), 0.0)
    best_error = tl.full((ROWS,), float("inf"), tl.float32)
    best_scale = tl.full((ROWS,), 1.0, tl.float32)
    best_zero = tl.full((ROWS,), 0.0, tl.float32)
    for step in range(steps + 1):
        ratio = largest - step * (largest - smallest) / tl.maximum(steps, 1)
        reach = tl.maximum(-bottom, peak) if SYMMETRIC else peak - bottom
        scale = tl.maximum((reach * ratio / top).to(STORED).to(tl.float32), least)
        inverse = 1.0 / scale
        zero = tl.full((ROWS,), 0.0, tl.float32)
        if not SYMMETRIC:
            zero = (-bottom * ratio * inverse + 12582912.0) - 12582912.0
            zero = tl.minimum(tl.maximum(zero, 0.0), high)
        difference = _difference(values, scale, inverse, zero, undone, low, high, SYMMETRIC)
        product = tl.dot(difference.to(PRODUCTS), gram)
        error = tl.sum(product * difference, axis=1)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    inverse = 1.0 / best_scale
    best = _difference(values, best_scale, inverse, best_zero, undone, low, high, SYMMETRIC)
    tl.store(differences + place, best.to(tl.bfloat16), mask=inside[:, None])


@triton.jit
def _difference(  # type: ignore[no-untyped-def]
    values, scale, inverse, zero, undone, low, high, SYMMETRIC: tl.constexpr
):
    """Rounded minus true weights, with the columns' factors, whose inverses are ``undone``, undone.

    Multiplies by the inverse of a scale, so a weight half-way between two codes may get the other
    code, which makes no difference to the error. A range is a part of the weights' own, at least
    a twentieth, so no ratio of a weight and its scale is too large for rounding by 1.5 * 2^23.
    """
    code = (values * inverse[:, None] + 12582912.0) - 12582912.0
    if SYMMETRIC:
        code = tl.minimum(tl.maximum(code, low), high)
    else:
        code = tl.minimum(tl.maximum(code + zero[:, None], low), high) - zero[:, None]
    return (code * scale[:, None] - values) * undone


def scaled_difference_on_gpu(
    weight: Tensor,
    scale: Tensor,
    blocks: Tensor,
    args: QuantArgs,
    *,
    steps: int,
    largest: float,
    smallest: float,
    least: float,
) -> Tensor:
    """``clipping.scaled_difference`` of several weights ``[n, out, in]`` as one kernel, bfloat16.

    ``scale: [n, in]``. ``blocks``: ``[n, groups, size, size]``; in bfloat16 products are of
    bfloat16, in float32 of TF32.
    """
    count, rows, width = weight.shape
    differences = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    low, high = args.code_range
    stored = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
    _scaled_differences[(triton.cdiv(rows, _ROWS), blocks.shape[1], count)](
        weight.contiguous(),
        scale.contiguous(),
        blocks,
        differences,
        rows,
        width,
        steps,
        largest,
        smallest,
        (high - low) / 2 if args.symmetric else float(high),
        float(low),
        float(high),
        least,
        SYMMETRIC=args.symmetric,
        STORED=stored[args.scale_dtype],
        PRODUCTS=tl.bfloat16 if blocks.dtype == torch.bfloat16 else tl.float32,
        GROUP=blocks.shape[2],
        ROWS=_ROWS,
        num_warps=8,
    )
    return differences
