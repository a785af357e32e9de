"""The recursion of GPTQ, in blocks of columns with lazy updates (algorithm 1 of the paper).

All tensors have a leading axis: the layers that are solved side by side, such as experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
#: The same of several side by side, by device. On an H200 larger panels are slower from four
#: matrices of 4096 or 7168 columns, smaller ones wait for the start of more kernels.
_PANEL_OF_SEVERAL = {"cuda": 512, "cpu": 128}
#: Bytes of a Gram matrix that is factored in its own memory: from a width of 16384.
_LARGE = 1 << 30


@contextmanager
def factored(gram: Tensor, order: Tensor, damp: float) -> Iterator[tuple[Tensor, list[float]]]:
    """``inverse_factor``; one large matrix is factored in its own memory.

    Then ``gram: [1, in, in]`` has other values within the context, and the factor is of use only on
    and above its diagonal, which is all that ``solve`` reads.
    """
    if len(gram) > 1 or gram.nbytes < _LARGE:
        yield inverse_factor(gram, order, damp)
        return
    # Only the upper half is overwritten: the rest of the matrix is kept below its diagonal.
    _permute(gram[0], order[0])
    panels = [slice(start, start + _PANEL) for start in range(0, gram.shape[1], _PANEL)]
    corners = [gram[0, panel, panel].clone() for panel in panels]
    try:
        yield gram, [_factor_in_place(gram, panels, corners, damp)]
    finally:
        _mirror(gram[0], panels, corners)
        _permute(gram[0], order[0].argsort())


def _factor_in_place(
    gram: Tensor, panels: list[slice], corners: list[Tensor], damp: float
) -> float:
    """Overwrites the upper half of ``gram: [1, in, in]`` by its inverse factor.

    ``corners``: what ``gram`` has in its ``panels``. Returns the damping used.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2).clone()
    mean = _mean(diagonal)
    while True:
        _damp(gram, diagonal, mean, damp)
        if not _factor(gram, keep_lower=True):
            _invert(gram)
            return damp
        _mirror(gram[0], panels, corners)
        damp = _more(damp)


def _mirror(matrix: Tensor, panels: list[slice], corners: list[Tensor]) -> None:
    """Makes ``matrix: [in, in]`` symmetric by its lower half, and ``corners`` on its diagonal."""
    for panel, corner in zip(panels, corners, strict=True):
        matrix[: panel.start, panel] = matrix[panel, : panel.start].T
        matrix[panel, panel] = corner


def _permute(matrix: Tensor, order: Tensor) -> None:
    """Puts rows and columns of ``matrix: [in, in]`` into ``order: [in]``, in its own memory."""
    for columns in matrix.split(_PANEL, 1):
        columns.copy_(columns[order])
    for rows in matrix.split(_PANEL):
        rows.copy_(rows[:, order])


def inverse_factor(gram: Tensor, order: Tensor, damp: float) -> tuple[Tensor, list[float]]:
    """Upper ``U: [n, in, in]``, ``UᵀU = (G + damp * mean(diag G) I)⁻¹``, and the dampings used.

    ``G`` is ``gram: [n, in, in]`` with its columns in ``order: [n, in]``. The Cholesky
    factorisation goes from the last row to the first, and is followed by a triangular inverse, both
    in the memory of one matrix; the inverse of ``G`` is never formed. Columns that are zero in all
    tokens get the mean as their diagonal, so they are rounded to nearest. Raises QplugError if a
    matrix cannot be factored with any damping.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2).gather(1, order)
    mean = _mean(diagonal)
    dampings = [damp] * len(gram)
    factors = _damped(gram, order, diagonal, mean, damp)
    failed = _factor(factors)
    _invert(factors)
    for number in failed:
        factors[number], dampings[number] = _with_more_damp(
            gram[number], order[number], diagonal[number], mean[number], damp
        )
    return factors, dampings


def _mean(diagonal: Tensor) -> Tensor:
    """The mean of ``diagonal: [n, in]`` of each matrix, or 1 if it is zero."""
    if not torch.isfinite(diagonal).all():  # the largest entries are on the diagonal
        raise QplugError("the inputs of this layer are not finite")
    return torch.where(diagonal.any(1), diagonal.mean(1), 1.0)


def _more(damp: float) -> float:
    """The damping to try after ``damp``."""
    more = max(damp * 10, 1e-4)
    if more > _MOST_DAMP:
        raise QplugError(
            "the statistics of this layer cannot be factored: too few calibration tokens"
        )
    return more


def _with_more_damp(
    gram: Tensor, order: Tensor, diagonal: Tensor, mean: Tensor, damp: float
) -> tuple[Tensor, float]:
    """The factor of one matrix that could not be factored with ``damp``, and the damping used."""
    while True:
        damp = _more(damp)
        factor = _damped(gram[None], order[None], diagonal[None], mean[None], damp)
        if not _factor(factor):
            _invert(factor)
            return factor[0], damp


def _damped(gram: Tensor, order: Tensor, diagonal: Tensor, mean: Tensor, damp: float) -> Tensor:
    """``gram: [n, in, in]`` in ``order: [n, in]``, with ``damp`` times ``mean: [n]`` added."""
    matrix = torch.empty_like(gram)
    for out, whole, columns in zip(matrix, gram, order, strict=True):
        for part, rows in zip(out.split(_PANEL), columns.split(_PANEL), strict=True):
            torch.index_select(whole[rows], 1, columns, out=part)
    _damp(matrix, diagonal, mean, damp)
    return matrix


def _damp(matrix: Tensor, diagonal: Tensor, mean: Tensor, damp: float) -> None:
    """Add ``damp`` times ``mean: [n]`` to each ``matrix: [n, in, in]``, which has ``diagonal``."""
    own = matrix.diagonal(dim1=1, dim2=2)
    own.add_(damp * mean[:, None])
    own.copy_(torch.where(diagonal == 0, mean[:, None], own))


def _panel(matrices: Tensor) -> int:
    return _PANEL if len(matrices) == 1 else _PANEL_OF_SEVERAL.get(matrices.device.type, _PANEL)


def _factor(matrices: Tensor, *, keep_lower: bool = False) -> list[int]:
    """Replace each of ``matrices: [n, in, in]`` by upper ``R``, ``R Rᵀ = matrix``.

    ``keep_lower``: what is below the panels on the diagonal stays, instead of zeros. Returns the
    numbers of those that are not positive definite, whose factors are of no use.
    """
    width, size = matrices.shape[1], _panel(matrices)
    failed = torch.zeros(len(matrices), dtype=torch.int32, device=matrices.device)
    for start in reversed(range(0, width, size)):
        panel = slice(start, start + size)
        corner, above = matrices[:, panel, panel], matrices[:, :start, panel]
        with one_thread():  # the same bytes with any number; a panel takes little time
            lower, info = torch.linalg.cholesky_ex(corner.flip(1, 2))
        failed |= info != 0
        corner.copy_(lower.flip(1, 2))
        if start:
            above.copy_(torch.linalg.solve_triangular(corner.mT, above, upper=False, left=False))
            if not keep_lower:
                matrices[:, panel, :start] = 0
        for row in range(0, start, _PANEL):  # only the upper half is used
            rows = slice(row, min(row + _PANEL, start))
            subtract(matrices[:, rows, row:start], above[:, rows], above[:, row:].mT)
    return failed.nonzero().flatten().tolist()


def _invert(upper: Tensor) -> None:
    """Replace ``[n, in, in]``, matrices of which the upper half counts, by their inverses."""
    width, size = upper.shape[1], _panel(upper)
    for start in range(0, width, size):
        panel = slice(start, start + size)
        corner, above = upper[:, panel, panel], upper[:, :start, panel]
        eye = torch.eye(corner.shape[1], device=upper.device).expand(corner.shape)
        corner.copy_(torch.linalg.solve_triangular(corner, eye, upper=True))
        right = above @ corner
        for row in range(0, start, _PANEL):
            rows = slice(row, min(row + _PANEL, start))
            above[:, rows] = -(upper[:, rows, row:start] @ right[:, row:])


def subtract(result: Tensor, left: Tensor, right: Tensor) -> None:
    """``result -= left @ right`` for each of ``n`` matrices.

    A CPU computes one after the other: its products of several matrices are slower.
    """
    if result.is_cuda:
        result.baddbmm_(left, right, alpha=-1)
        return
    for own, first, second in zip(result, left, right, strict=True):
        own.addmm_(first, second, alpha=-1)


def corrected(weight: Tensor, drift: Tensor, factor: Tensor, order: Tensor, part: float) -> Tensor:
    """The weights that correct ``part`` of the drift of their inputs (GPTAQ, arXiv 2504.02692).

    ``W + part * W driftᵀ (G + damp I)⁻¹``: for ``part`` 1 its outputs on inputs ``x`` are as close,
    in least squares, to the outputs of ``weight: [n, out, in]`` on the float model's ``y`` as
    possible. ``factor``: from ``inverse_factor``, for columns in ``order: [n, in]``. ``drift: [n,
    in, in]``: the sum of ``xᵀ(y - x)``.
    """
    moved = (weight @ drift.mT).gather(2, order[:, None].expand(weight.shape))
    pull = moved @ factor.mT @ factor
    return weight.scatter_add(2, order[:, None].expand(weight.shape), part * pull)


def solve(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    args: QuantArgs,
    factor: Tensor,
    order: Tensor,
    block_size: int,
) -> Tensor:
    """Codes ``[n, out, in]`` of ``weight: [n, out, in]`` under given scales (static groups).

    ``scale`` and ``zero``: ``[n, *args.scale_shape]``. ``factor``: from ``inverse_factor``, for
    columns in ``order: [n, in]``. Codes are in the order of the weight.
    """
    count, rows, width = weight.shape
    # [n, in, out]: columns are contiguous
    work = weight.mT.gather(1, order[:, :, None].expand(count, width, rows))
    codes = torch.empty(work.shape, dtype=code_dtype(args), device=work.device)
    # torch scatters no fp8, but its bytes.
    stored = codes.view(torch.uint8) if codes.element_size() == 1 else codes
    round_columns = rounder(work, args, block_size)
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        columns = order[:, start:stop]
        scales, zeros = column_scales(scale, zero, args, columns, rows)
        rounded, errors = round_columns(
            work[:, start:stop], scales, zeros, factor[:, start:stop, start:stop], args
        )
        places = columns[:, :, None].expand(rounded.shape)
        stored.scatter_(1, places, rounded.to(codes.dtype).view(stored.dtype))
        if stop < width:
            subtract(work[:, stop:], factor[:, start:stop, stop:].mT, errors)
    return codes.mT.contiguous()


def rounder(work: Tensor, args: QuantArgs, block_size: int) -> Rounder:
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
    """Codes and scaled errors, ``[n, columns, out]``, of a block of columns, rounded in order.

    Overwrites ``work: [n, columns, out]``. ``scales`` and ``zeros``: ``[n, columns, out]``.
    ``factor: [n, columns, columns]``, upper. Each column's error is pushed onto the later columns
    of the block.
    """
    codes, errors = torch.empty_like(work), torch.empty_like(work)
    for column in range(work.shape[1]):
        zero = None if zeros is None else zeros[:, column]
        codes[:, column], value = round_codes(work[:, column], scales[:, column], zero, args)
        errors[:, column] = (work[:, column] - value) / factor[:, column, column, None]
        work[:, column + 1 :] -= factor[:, column, column + 1 :, None] * errors[:, None, column]
    return codes, errors
