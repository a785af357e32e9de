"""A GPU kernel for ``losses``: the error of a layer's output, without the product in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _STEP = 128, 64
#: Columns of a tile, and the bytes of shared memory that a device must have for so many.
_COLUMNS, _NARROW, _LARGE = 256, 128, 160 << 10
_STAGES = 4  # tiles that are loaded ahead, at most
_GROUP = 8  # tiles of rows that are worked on at once, with all columns: they share a cache


# Triton accepts no annotations but its own.
@triton.jit(do_not_specialize=["rows", "row_tiles", "column_tiles"])
def _output_errors(  # type: ignore[no-untyped-def]
    difference,
    gram,
    errors,
    rows,
    width,
    row_tiles,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """One program sums ``(D U) * D`` over a tile, where ``U`` is half of the symmetric ``G``.

    ``U`` is ``G`` above the diagonal blocks, twice, and the diagonal blocks, once: half of the
    products are enough. ``errors: [n, row_tiles, column_tiles]``.
    """
    number, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    difference += matrix * rows * width
    gram += matrix * width * width
    first = number // (GROUP * column_tiles) * GROUP
    inside = number % (GROUP * column_tiles)
    height = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + inside % height
    column_tile = column_tiles - 1 - inside // height  # those with the most products come first
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    own_rows, own_columns = row[:, None] < rows, column[None, :] < width
    at_rows = difference + row[:, None] * width
    step = tl.arange(0, STEP)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    start = column_tile * COLUMNS
    for place in range(0, start, STEP):
        part = tl.load(at_rows + (place + step)[None, :], mask=own_rows, other=0.0)
        above = tl.load(
            gram + (place + step)[:, None].to(tl.int64) * width + column[None, :],
            mask=own_columns,
            other=0.0,
        )
        product = tl.dot(part.to(PRODUCTS), above, product)
    product *= 2
    for place in range(start, tl.minimum(start + COLUMNS, width), STEP):
        known = place + step < width
        part = tl.load(at_rows + (place + step)[None, :], mask=own_rows & known[None, :], other=0.0)
        block = tl.load(
            gram + (place + step)[:, None].to(tl.int64) * width + column[None, :],
            mask=own_columns & known[:, None],
            other=0.0,
        )
        product = tl.dot(part.to(PRODUCTS), block, product)
    tile = tl.load(at_rows + column[None, :], mask=own_rows & own_columns, other=0.0)
    error = tl.sum(tl.sum(product * tile.to(tl.float32), axis=1), axis=0)
    tl.store(errors + (matrix * row_tiles + row_tile) * column_tiles + column_tile, error)


def output_errors_on_gpu(difference: Tensor, gram: Tensor) -> Tensor:
    """``losses.output_errors`` as one kernel.

    ``difference: [n, out, in]``, float32 or bfloat16. ``gram: [n, in, in]``, symmetric; in bfloat16
    products are of bfloat16, in float32 of TF32.
    """
    count, rows, width = difference.shape
    columns, stages = _tiles(difference, gram)
    row_tiles, column_tiles = triton.cdiv(rows, _ROWS), triton.cdiv(width, columns)
    errors = torch.empty(count, row_tiles, column_tiles, device=difference.device)
    _output_errors[(row_tiles * column_tiles, count)](
        difference.contiguous(),
        gram.contiguous(),
        errors,
        rows,
        width,
        row_tiles,
        column_tiles,
        ROWS=_ROWS,
        COLUMNS=columns,
        STEP=_STEP,
        GROUP=_GROUP,
        PRODUCTS=tl.bfloat16 if gram.dtype == torch.bfloat16 else tl.float32,
        num_warps=8,
        num_stages=stages,
    )
    return errors.sum((1, 2), dtype=torch.float64)


def _tiles(difference: Tensor, gram: Tensor) -> tuple[int, int]:
    """The columns of a tile, and how many steps are loaded ahead, as the device has room."""
    room = 0
    if difference.is_cuda:
        device = torch.cuda.get_device_properties(difference.device)
        room = getattr(device, "shared_memory_per_block_optin", 0)  # NVIDIA's alone have it
    columns = _COLUMNS if room >= _LARGE else _NARROW
    each = _STEP * (_ROWS * difference.element_size() + columns * gram.element_size())
    return columns, max(2, min(_STAGES, room // each))
