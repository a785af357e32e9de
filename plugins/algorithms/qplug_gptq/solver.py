"""The recursion of GPTQ, in blocks of columns with lazy updates (algorithm 1 of the paper)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from qplug import QplugError, QuantArgs
from qplug.numerics import code_dtype, column_scales, one_thread, round_codes

#: ``round_columns``, or a kernel with the same arguments and results.
Rounder: TypeAlias = Callable[
    [Tensor, Tensor, "Tensor | None", Tensor, QuantArgs], tuple[Tensor, Tensor]
]

#: The largest damping; it is raised tenfold until the matrix can be factored.
_MOST_DAMP = 10.0
#: Rows of a matrix that are factored at a time.
_PANEL = 1024


def inverse_factor(gram: Tensor, order: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper ``U: [in, in]`` with ``UᵀU = (G + damp * mean(diag G) I)⁻¹``, and the damping used.

    ``G`` is ``gram: [in, in]`` with its columns in ``order``. The Cholesky factorisation goes from
    the last row to the first, and is followed by a triangular inverse, both in the memory of one
    matrix; the inverse of ``G`` is never formed. Columns that are zero in all tokens get the mean
    as their diagonal, so they are rounded to nearest. Raises QplugError if the matrix cannot be
    factored with any damping.
    """
    diagonal = gram.diagonal()[order]
    if not torch.isfinite(diagonal).all():  # the largest entries are on the diagonal
        raise QplugError("the inputs of this layer are not finite")
    mean = diagonal.mean() if diagonal.any() else torch.ones((), device=gram.device)
    while damp <= _MOST_DAMP:
        factor = torch.empty_like(gram)
        for part, rows in zip(factor.split(_PANEL), order.split(_PANEL), strict=True):
            torch.index_select(gram[rows], 1, order, out=part)
        factor.diagonal().add_(damp * mean)
        factor.diagonal()[diagonal == 0] = mean
        if _factor(factor):
            _invert(factor)
            return factor, damp
        damp = max(damp * 10, 1e-4)
    raise QplugError("the statistics of this layer cannot be factored: too few calibration tokens")


def _factor(matrix: Tensor) -> bool:
    """Replace ``matrix`` by upper ``R``, ``R Rᵀ = matrix``; False if not positive definite."""
    for start in reversed(range(0, len(matrix), _PANEL)):
        panel = slice(start, start + _PANEL)
        corner, above = matrix[panel, panel], matrix[:start, panel]
        with one_thread():  # the same bytes with any number; a panel takes little time
            lower, failed = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if failed:
            return False
        corner.copy_(lower.flip(0, 1))
        if start:
            above.copy_(torch.linalg.solve_triangular(corner.T, above, upper=False, left=False))
            matrix[panel, :start] = 0
        for row in range(0, start, _PANEL):  # only the upper half is used
            rows = slice(row, row + _PANEL)
            matrix[rows, row:start].addmm_(above[rows], above[row:].T, alpha=-1)
    return True


def _invert(upper: Tensor) -> None:
    """Replace a matrix that is zero below its diagonal by its inverse."""
    for start in range(0, len(upper), _PANEL):
        panel = slice(start, start + _PANEL)
        corner, above = upper[panel, panel], upper[:start, panel]
        eye = torch.eye(len(corner), device=upper.device)
        corner.copy_(torch.linalg.solve_triangular(corner, eye, upper=True))
        right = above @ corner
        for row in range(0, start, _PANEL):
            rows = slice(row, row + _PANEL)
            above[rows] = -(upper[rows, row:start] @ right[row:])


def corrected(weight: Tensor, drift: Tensor, factor: Tensor, order: Tensor, part: float) -> Tensor:
    """The weight that corrects ``part`` of the drift of its inputs (GPTAQ, arXiv 2504.02692).

    ``W + part * W driftᵀ (G + damp I)⁻¹``: for ``part`` 1 its outputs on inputs ``x`` are as close,
    in least squares, to the outputs of ``weight: [out, in]`` on the float model's ``y`` as
    possible. ``factor``: from ``inverse_factor``, for columns in ``order``. ``drift: [in, in]``:
    the sum of ``xᵀ(y - x)``.
    """
    pull = (weight @ drift.T)[:, order] @ factor.T @ factor
    return weight.index_add(1, order, pull, alpha=part)


def solve(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    args: QuantArgs,
    factor: Tensor,
    order: Tensor,
    block_size: int,
) -> Tensor:
    """Codes ``[out, in]`` of ``weight: [out, in]`` under given scales (static groups).

    ``factor``: from ``inverse_factor``, for columns in ``order``. Codes are in the order of the
    weight.
    """
    work = weight.T[order]  # [in, out]: columns are contiguous
    codes = torch.empty(work.shape, dtype=code_dtype(args), device=work.device)
    round_columns = _rounder(work, args, block_size)
    for start in range(0, len(work), block_size):
        stop = min(start + block_size, len(work))
        columns = order[start:stop]
        scales, zeros = column_scales(scale, zero, args, columns, work.shape[1])
        rounded, errors = round_columns(
            work[start:stop], scales, zeros, factor[start:stop, start:stop], args
        )
        codes[columns] = rounded.to(codes.dtype)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()


def _rounder(work: Tensor, args: QuantArgs, block_size: int) -> Rounder:
    """The function that rounds a block of columns: one kernel on a GPU, plain torch elsewhere."""
    # The kernel knows these grids, and has registers for 128 columns.
    has_kernel = not args.is_float or (args.dtype == "e4m3" and not args.use_qtorch)
    if work.is_cuda and block_size <= 128 and has_kernel:
        from qplug_gptq.kernel import round_columns_on_gpu

        return round_columns_on_gpu
    return round_columns


def round_columns(
    work: Tensor, scales: Tensor, zeros: Tensor | None, factor: Tensor, args: QuantArgs
) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors, ``[columns, out]``, of a block of columns, rounded in order.

    Overwrites ``work: [columns, out]``. ``scales`` and ``zeros``: ``[columns, out]``. ``factor:
    [columns, columns]``, upper. Each column's error is pushed onto the later columns of the block.
    """
    codes, errors = torch.empty_like(work), torch.empty_like(work)
    for column in range(len(work)):
        zero = None if zeros is None else zeros[column]
        codes[column], value = round_codes(work[column], scales[column], zero, args)
        errors[column] = (work[column] - value) / factor[column, column]
        work[column + 1 :] -= factor[column, column + 1 :, None] * errors[column]
    return codes, errors
