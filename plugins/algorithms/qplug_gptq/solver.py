"""The recursion of GPTQ, in blocks of columns with lazy updates (algorithm 1 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from qplug import QplugError, QuantArgs
from qplug.numerics import code_dtype, per_column, round_codes

#: Damping is raised tenfold until the matrix can be factored, at most to this.
_MOST_DAMP = 10.0


def inverse_factor(gram: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper ``U: [in, in]`` with ``UᵀU = (G + damp * mean(diag G) I)⁻¹``, and the damping used.

    One Cholesky factorisation from the last row to the first, and one triangular inverse: the
    inverse itself is never formed. Columns that no token excites are given a diagonal of one, which
    leaves them to nearest rounding. Raises QplugError if no damping helps.
    """
    if not torch.isfinite(gram).all():
        raise QplugError("the inputs of this layer are not finite")
    diagonal = gram.diagonal()
    mean = diagonal.mean() if diagonal.any() else torch.ones((), device=gram.device)
    while damp <= _MOST_DAMP:
        damped = gram.clone()
        damped.diagonal().add_(damp * mean)
        damped.diagonal()[diagonal == 0] = mean
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = lower.flip(0, 1)  # G = upper upperᵀ
            eye = torch.eye(len(gram), device=gram.device)
            return torch.linalg.solve_triangular(upper, eye, upper=True), damp
        damp = max(damp * 10, 1e-4)
    raise QplugError("the statistics of this layer cannot be factored: too few calibration tokens")


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

    ``factor`` is that of ``inverse_factor`` for columns in ``order``; codes are in the weight's.
    """
    work = weight[:, order].T.contiguous()  # [in, out]: a column is a run of memory
    scales, zeros = per_column(scale, zero, args, weight.shape)
    scales = scales[:, order].T.contiguous()
    zeros = None if zeros is None else zeros[:, order].T.contiguous()
    codes = torch.empty(work.shape, dtype=code_dtype(args), device=work.device)
    for start in range(0, len(work), block_size):
        stop = min(start + block_size, len(work))
        errors = torch.empty(stop - start, work.shape[1], device=work.device)
        for column in range(start, stop):
            row = work[column]
            spread = scales[column]
            shift = None if zeros is None else zeros[column]
            code, value = round_codes(row, spread, shift, args)
            codes[column] = code
            error = (row - value) / factor[column, column]
            errors[column - start] = error
            rest = factor[column, column + 1 : stop, None]
            work[column + 1 : stop] -= rest * error
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return codes[inverse].T.contiguous()
