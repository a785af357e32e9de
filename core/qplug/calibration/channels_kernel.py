"""A GPU kernel for ``channels``: each row is read once, for extremes and sums of all tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

#: A program reads blocks of this many rows and channels: 16 half-precision numbers are one sector
#: of the GPU's memory, and so few channels leave work for all of its processors.
_ROWS, _COLUMNS = 64, 16


# Triton accepts no annotations but its own.
@triton.jit(do_not_specialize=["rows"])
def _add(  # type: ignore[no-untyped-def]
    x,
    starts,
    low,
    high,
    total,
    absolute,
    rows,
    width,
    stride,
    SEVERAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program handles ``COLUMNS`` channels of one tensor, so that sums have one order."""
    tensor = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    start = tensor * 0
    end = start + rows
    if SEVERAL:
        start, end = tl.load(starts + tensor), tl.load(starts + tensor + 1)
    lows = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    highs = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    totals = tl.zeros((ROWS, COLUMNS), tl.float32)
    absolutes = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        here = (row < end)[:, None] & inside[None, :]
        values = tl.load(x + row[:, None] * stride + column[None, :], mask=here, other=0.0)
        values = values.to(tl.float32)
        lows = tl.minimum(lows, tl.where(here, values, float("inf")))
        highs = tl.maximum(highs, tl.where(here, values, float("-inf")))
        totals += values
        absolutes += tl.abs(values)
    place = tensor * width + column
    sums, sizes = tl.sum(totals, 0), tl.sum(absolutes, 0)
    # Extremes of a block leave NaN out. Sums of magnitudes do not, and infinities make none there.
    is_number = sizes == sizes  # noqa: PLR0124
    least = tl.where(is_number, tl.min(lows, 0), sizes)
    most = tl.where(is_number, tl.max(highs, 0), sizes)
    least = tl.minimum(tl.load(low + place, mask=inside), least, propagate_nan=tl.PropagateNan.ALL)
    tl.store(low + place, least, mask=inside)
    most = tl.maximum(tl.load(high + place, mask=inside), most, propagate_nan=tl.PropagateNan.ALL)
    tl.store(high + place, most, mask=inside)
    before = tl.load(total + place, mask=inside)
    tl.store(total + place, before + sums.to(tl.float64), mask=inside)
    before = tl.load(absolute + place, mask=inside)
    tl.store(absolute + place, before + sizes.to(tl.float64), mask=inside)


def add_on_gpu(
    x: Tensor, starts: Tensor | None, low: Tensor, high: Tensor, total: Tensor, absolute: Tensor
) -> None:
    """``Channels.add`` as one kernel; the rows of a block are summed in float32."""
    rows = x if x.stride(1) == 1 else x.contiguous()
    count, width = low.shape
    _add[(triton.cdiv(width, _COLUMNS), count)](
        rows,
        low if starts is None else starts,
        low,
        high,
        total,
        absolute,
        rows.shape[0],
        width,
        rows.stride(0),
        SEVERAL=starts is not None,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
