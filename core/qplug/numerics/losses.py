"""Errors of quantized weights, and of the outputs of layers that use them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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
from qplug.numerics.alike import as_one, of_one_shape, together
from qplug.numerics.chunks import GPU_CHUNK, in_chunks

#: Magnitudes of weights beyond which squares overflow, or underflow, in float32.
TOO_LARGE, TOO_SMALL = 1e18, 1e-18
_COLUMNS = 256  # of a Gram matrix that are multiplied at a time


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
    places, found = [], []
    for alike in of_one_shape([weight for weight, _ in pairs]):
        run = [pairs[place] for place in alike]
        places += alike
        joined = as_one([quantized for _, quantized in run])
        if joined is None:
            found += [_squares(weight, quantized, 1) for weight, quantized in run]
        else:
            weight = together([weight for weight, _ in run]).flatten(0, 1)
            found.append(_squares(weight, joined, len(run)))
    errors = [0.0] * len(pairs)
    for place, (error, norm) in zip(places, torch.cat(found).tolist(), strict=True):
        weight = pairs[place][0]
        if norm < TOO_SMALL**2 * weight.numel() and weight.any():
            errors[place] = math.nan
        else:
            errors[place] = (error / norm) ** 0.5 if norm else float(error > 0)
    return errors


def _squares(weight: Tensor, quantized: QuantizedWeight, count: int) -> Tensor:
    """``||W' - W||²`` and ``||W||²`` of ``count`` weights, float64 ``[count, 2]``.

    ``weight: [count * out, in]`` and ``quantized`` have one weight below the other.
    """
    errors, norms = [], []  # of each row
    for _, original, difference in _differences(weight, quantized):
        norms.append(_row_squares(original))
        errors.append(_row_squares(difference))
    sums = [torch.cat(each).view(count, -1).sum(1) for each in (errors, norms)]
    return torch.stack(sums, 1)


def _differences(
    weight: Tensor, quantized: QuantizedWeight
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields some rows of ``weight: [out, in]``, their values, and ``W' - W`` of them, float32."""
    args, step = quantized.args, row_step(quantized.args)
    scale = quantized.scale.expand(row_scales(weight, args))
    zero = None if quantized.zero is None else quantized.zero.expand(scale.shape)
    for steps, groups in in_chunks(weight, args):
        rows = slice(steps.start * step, min(steps.stop * step, len(weight)))
        codes = quantized.codes[rows].to(torch.float32, copy=True)
        part = in_groups(codes, args)
        if zero is not None:
            part -= spread_scales(zero[steps])
        part *= spread_scales(scale[steps])
        original = out_of_groups(groups, codes.shape[1], codes.shape[0])
        # Cut to the weight's shape: the padding of ragged blocks is no error.
        yield rows, original, out_of_groups(part.sub_(groups), codes.shape[1], codes.shape[0])


def _row_squares(rows: Tensor) -> Tensor:
    """The sum of squares of each row, float64."""
    return rows.square().sum(1, dtype=torch.float64)


def relative_output_error(weight: Tensor, quantized: QuantizedWeight, gram: Tensor) -> float:
    """``||XW'ᵀ - XWᵀ|| / ||XWᵀ||`` over all tokens; ``gram: [in, in]`` is the sum of ``xᵀx``."""
    return relative_output_errors(weight[None], [quantized], gram[None])[0]


def relative_output_errors(
    weight: Tensor, quantized: Sequence[QuantizedWeight], gram: Tensor
) -> list[float]:
    """The ``relative_output_error`` of several linears.

    ``weight: [n, out, in]``, ``gram: [n, in, in]``.
    """
    factor = as_factor(gram)
    norms = output_errors(weight.float(), factor)
    joined = as_one(quantized) if weight.is_cuda else None
    if joined is not None:
        difference = dequantize(joined).view(weight.shape).sub_(weight)
    else:
        # A few rows at a time: of one large weight there is no room for several copies.
        difference = torch.empty_like(weight, dtype=torch.float32)
        for own, original, each in zip(difference, weight, quantized, strict=True):
            for rows, _, part in _differences(original, each):
                own[rows] = part
    errors = output_errors(difference, factor)
    pairs = zip(errors.tolist(), norms.tolist(), strict=True)
    return [(max(error, 0.0) / norm) ** 0.5 if norm > 0 else 0.0 for error, norm in pairs]


def output_error(difference: Tensor, gram: Tensor) -> float:
    """``tr(D G Dᵀ)``: the squared error of a linear's output over all tokens.

    ``difference: [out, in]``: ``D``, the error of the weight. ``gram: [in, in]``: ``G``, symmetric.
    A GPU multiplies in bfloat16 and sums in float32: over 10^8 terms rounding changes the sum far
    less than the differences of interest.
    """
    return float(output_errors(difference[None], gram[None]))


def output_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """``output_error`` of several linears: float64 ``[n]``, on their device.

    ``difference: [n, out, in]``, ``gram: [n, in, in]``, which may be ``as_factor(gram)``.
    """
    factor = as_factor(gram)
    if multiplies_halves(difference):
        from qplug.numerics.losses_kernel import output_errors_on_gpu

        return output_errors_on_gpu(difference, factor)
    totals = torch.zeros(len(difference), dtype=torch.float64, device=difference.device)
    rows = max(1, GPU_CHUNK // 4 // difference[0, 0].numel() // len(difference))
    for part in difference.split(rows, dim=1):
        # Half of the products are enough, as G is symmetric: those on its diagonal blocks, and
        # those above them, twice.
        for start in range(0, part.shape[2], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            own = part[:, :, columns]
            product = own @ factor[:, columns, columns]
            if start:
                product.baddbmm_(part[:, :, :start], factor[:, :start, columns], alpha=2)
            totals += product.mul_(own).sum((1, 2), dtype=torch.float64)
    return totals


def as_factor(gram: Tensor) -> Tensor:
    """``gram`` as products with it are computed, in bfloat16 on a GPU that multiplies it."""
    return gram.bfloat16() if multiplies_halves(gram) else gram


def multiplies_halves(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on a GPU that multiplies bfloat16, and has kernels for it."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
