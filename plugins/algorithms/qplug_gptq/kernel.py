"""A GPU kernel for a block of GPTQ's columns; a thread holds all columns of a row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplug import FLOAT_MAX, QuantArgs

_ROWS = 32  # rows of the weight in one program: a warp with one row per thread


# Triton accepts no annotations but its own.
@triton.jit(do_not_specialize=["columns", "work_step", "factor_step"])
def _round_block(  # type: ignore[no-untyped-def]
    work,
    scales,
    zeros,
    factor,
    codes,
    errors,
    rows,
    columns,
    work_step,
    factor_step,
    factor_stride,
    low,
    high,
    HAS_ZERO: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Tensors are ``[n, columns, rows]``; ``factor: [n, columns, columns]``.

    ``work`` and ``factor`` have steps of their own from one of ``n`` matrices to the next.
    """
    matrix = tl.program_id(1).to(tl.int64)
    work += matrix * work_step
    factor += matrix * factor_step
    scales += matrix * rows * columns
    codes += matrix * rows * columns
    errors += matrix * rows * columns
    if HAS_ZERO:
        zeros += matrix * rows * columns
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)
    place = column[:, None] * rows + row[None, :]
    tile = tl.load(work + place, mask=(column[:, None] < columns) & inside[None, :], other=0.0)
    for i in range(columns):
        here = i * rows + row
        value = tl.sum(tl.where(column[:, None] == i, tile, 0.0), axis=0)
        scale = tl.load(scales + here, mask=inside, other=1.0)
        ratio = tl.math.div_rn(value, scale)
        if IS_FLOAT:
            code = tl.minimum(tl.maximum(ratio, low), high).to(tl.float8e4nv).to(tl.float32)
            restored = code * scale
        else:
            # Adding and subtracting 1.5 * 2^23 rounds to nearest, ties to even. It fails for
            # large values, but these are out of the range of codes anyway.
            ratio = tl.minimum(tl.maximum(ratio, -4194304.0), 4194304.0)
            code = (ratio + 12582912.0) - 12582912.0
            if HAS_ZERO:
                zero = tl.load(zeros + here, mask=inside, other=0.0)
                code = tl.minimum(tl.maximum(code + zero, low), high)
                restored = (code - zero) * scale
            else:
                code = tl.minimum(tl.maximum(code, low), high)
                restored = code * scale
        error = tl.math.div_rn(value - restored, tl.load(factor + i * factor_stride + i))
        tl.store(codes + here, code, mask=inside)
        tl.store(errors + here, error, mask=inside)
        later = (column > i) & (column < columns)
        push = tl.load(factor + i * factor_stride + column, mask=later, other=0.0)
        tile -= push[:, None] * error[None, :]


def round_columns_on_gpu(
    work: Tensor, scales: Tensor, zeros: Tensor | None, factor: Tensor, args: QuantArgs
) -> tuple[Tensor, Tensor]:
    """``solver.round_columns`` as one kernel; it leaves ``work`` unchanged."""
    count, columns, rows = work.shape
    assert work.stride(1) == rows
    assert factor.stride(2) == 1
    codes = torch.empty(work.shape, device=work.device)
    errors = torch.empty_like(codes)
    low, high = args.code_range if not args.is_float else (-FLOAT_MAX["e4m3"], FLOAT_MAX["e4m3"])
    _round_block[(triton.cdiv(rows, _ROWS), count)](
        work,
        scales.contiguous(),
        scales if zeros is None else zeros.contiguous(),
        factor,
        codes,
        errors,
        rows,
        columns,
        work.stride(0),
        factor.stride(0),
        factor.stride(1),
        float(low),
        float(high),
        HAS_ZERO=zeros is not None,
        IS_FLOAT=args.is_float,
        COLUMNS=triton.next_power_of_2(columns),
        ROWS=_ROWS,
        num_warps=1,
    )
    return codes, errors
