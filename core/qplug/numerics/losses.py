"""Errors of quantized weights, and of the outputs of layers that use them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qplug.api import QuantizedWeight
from qplug.api.groups import (
    dequantize,
    in_groups,
    out_of_groups,
    row_scales,
    row_step,
    spread_scales,
)
from qplug.numerics.chunks import GPU_CHUNK, in_chunks

#: Magnitudes of weights beyond which squares overflow, or underflow, in float32.
TOO_LARGE, TOO_SMALL = 1e18, 1e-18


def too_large(peak: float) -> str:
    """A sentence on a weight whose largest magnitude is ``peak``, more than ``TOO_LARGE``."""
    return f"has weights up to {peak:.3g}, too large to compute with; mend the float model"


def overflowing(peak: float, dtype: str) -> str:
    """A sentence on values up to ``peak`` that overflow ``dtype``, the dtype of the model."""
    return (
        f"has values up to {peak:.3g}, which overflow {dtype}, the dtype in config.json; "
        "state bfloat16 there"
    )


def too_small(peak: float) -> str:
    """A sentence on a weight whose largest magnitude is ``peak``, less than ``TOO_SMALL``."""
    return (
        f"its largest weight is {peak:.3g}, too small to compute with; "
        "mend the float model, or set the weight to zero there"
    )


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """``||W' - W|| / ||W||`` (Frobenius) of ``weight: [out, in]``; 0 if both are zero.

    NaN if squares of the weight overflow float32, or vanish although the weight is not zero.
    """
    return relative_errors([(weight, quantized)])[0]


def relative_errors(pairs: Sequence[tuple[Tensor, QuantizedWeight]]) -> list[float]:
    """The ``relative_error`` of each pair; a GPU is waited for once."""
    if not pairs:
        return []
    squares = torch.stack([_squares(weight, quantized) for weight, quantized in pairs])
    found = []
    for (error, norm), (weight, _) in zip(squares.tolist(), pairs, strict=True):
        if norm < TOO_SMALL**2 * weight.numel() and weight.any():
            found.append(math.nan)
        else:
            found.append((error / norm) ** 0.5 if norm else float(error > 0))
    return found


def _squares(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """``||W' - W||²`` and ``||W||²``, float64 ``[2]``."""
    args, step = quantized.args, row_step(quantized.args)
    scale = quantized.scale.expand(row_scales(weight, args))
    zero = None if quantized.zero is None else quantized.zero.expand(scale.shape)
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for rows, groups in in_chunks(weight, args):
        codes = quantized.codes[rows.start * step : rows.stop * step]
        part = in_groups(codes.float(), args)
        if zero is not None:
            part -= spread_scales(zero[rows])
        part *= spread_scales(scale[rows])
        squares[1] += groups.square().sum(dtype=torch.float64)
        # Cut to the weight's shape: the padding of ragged blocks is no error.
        difference = out_of_groups(part.sub_(groups), codes.shape[1], codes.shape[0])
        squares[0] += difference.square_().sum(dtype=torch.float64)
    return squares


def relative_output_error(weight: Tensor, quantized: QuantizedWeight, gram: Tensor) -> float:
    """``||XW'ᵀ - XWᵀ|| / ||XWᵀ||`` over all tokens; ``gram: [in, in]`` is the sum of ``xᵀx``."""
    return relative_output_errors(weight[None], [quantized], gram[None])[0]


def relative_output_errors(
    weight: Tensor, quantized: Sequence[QuantizedWeight], gram: Tensor
) -> list[float]:
    """The ``relative_output_error`` of several linears.

    ``weight: [n, out, in]``, ``gram: [n, in, in]``.
    """
    norms = output_errors(weight.float(), gram)
    difference = torch.empty(weight.shape, device=weight.device)
    for out, own, codes in zip(difference, weight, quantized, strict=True):
        torch.sub(dequantize(codes), own, out=out)
    errors = output_errors(difference, gram)
    pairs = zip(errors.tolist(), norms.tolist(), strict=True)
    return [(max(error, 0.0) / norm) ** 0.5 if norm > 0 else 0.0 for error, norm in pairs]


def output_error(difference: Tensor, gram: Tensor) -> float:
    """``tr(D G Dᵀ)``: the squared error of a linear's output over all tokens.

    ``difference: [out, in]``: ``D``, the error of the weight. ``gram: [in, in]``: ``G``. A GPU
    multiplies in bfloat16 and sums in float32: over 10^8 terms rounding changes the sum far less
    than the differences of interest.
    """
    return float(output_errors(difference[None], gram[None]))


def output_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """``output_error`` of several linears: float64 ``[n]``, on their device.

    ``difference: [n, out, in]``, ``gram: [n, in, in]``.
    """
    halved = gram.bfloat16() if difference.is_cuda else gram
    totals = torch.zeros(len(difference), dtype=torch.float64, device=difference.device)
    rows = max(1, GPU_CHUNK // 4 // difference[0, 0].numel() // len(difference))
    for part in difference.split(rows, dim=1):
        if difference.is_cuda:
            product = torch.bmm(part.bfloat16(), halved, out_dtype=torch.float32)
        else:
            product = part @ halved
        totals += product.mul_(part).sum((1, 2), dtype=torch.float64)
    return totals
