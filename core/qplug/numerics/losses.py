"""Errors of quantized weights, and of the outputs of layers that use them."""

from __future__ import annotations

import math

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
    args, step = quantized.args, row_step(quantized.args)
    scale = quantized.scale.expand(row_scales(weight, args))
    zero = None if quantized.zero is None else quantized.zero.expand(scale.shape)
    error = norm = 0.0
    for rows, groups in in_chunks(weight, args):
        codes = quantized.codes[rows.start * step : rows.stop * step]
        part = in_groups(codes.float(), args)
        if zero is not None:
            part -= spread_scales(zero[rows])
        part *= spread_scales(scale[rows])
        norm += groups.square().sum(dtype=torch.float64).item()
        # Cut to the weight's shape: the padding of ragged blocks is no error.
        difference = out_of_groups(part.sub_(groups), codes.shape[1], codes.shape[0])
        error += difference.square_().sum(dtype=torch.float64).item()
    if norm < TOO_SMALL**2 * weight.numel() and weight.any():
        return math.nan
    return (error / norm) ** 0.5 if norm else float(error > 0)


def relative_output_error(weight: Tensor, quantized: QuantizedWeight, gram: Tensor) -> float:
    """``||XW'ᵀ - XWᵀ|| / ||XWᵀ||`` over all tokens; ``gram: [in, in]`` is the sum of ``xᵀx``."""
    norm = output_error(weight.float(), gram)
    error = output_error(dequantize(quantized).sub_(weight), gram)
    return (max(error, 0.0) / norm) ** 0.5 if norm > 0 else 0.0


def output_error(difference: Tensor, gram: Tensor) -> float:
    """``tr(D G Dᵀ)``: the squared error of a linear's output over all tokens.

    ``difference: [out, in]``: ``D``, the error of the weight. ``gram: [in, in]``: ``G``. A GPU
    multiplies in bfloat16 and sums in float32: over 10^8 terms rounding changes the sum far less
    than the differences of interest.
    """
    halved = gram.bfloat16() if difference.is_cuda else gram
    total = torch.zeros((), dtype=torch.float64, device=difference.device)
    for part in difference.split(max(1, GPU_CHUNK // 4 // difference.shape[1])):
        if difference.is_cuda:
            product = torch.mm(part.bfloat16(), halved, out_dtype=torch.float32)
        else:
            product = part @ halved
        total += product.mul_(part).sum(dtype=torch.float64)
    return total.item()
