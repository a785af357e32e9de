"""Codes of weights: from weights to codes, and back. All arithmetic is float32.

For an integer grid with codes ``qmin .. qmax`` and a weight ``w`` under scale ``s``::

    symmetric     s = max|w| / ((qmax - qmin) / 2)       q = clamp(round(w / s))
    asymmetric    s = (max(w, 0) - min(w, 0)) / qmax     z = round(-min(w, 0) / s)
                                                         q = clamp(round(w / s) + z)

and ``w' = (q - z) * s``. A float grid has ``s = max|w| / max(grid)`` and saturates. Rounding is to
nearest, ties to even. Scales in e4m3 are multiples of a power of two, ``global_scale``; scales in
e8m0 are powers of two themselves. (Arithmetic in bfloat16 would put 8 to 10 % of int8 codes one
step off.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qplug.api import Linear, QuantizedWeight
from qplug.api.groups import (
    out_of_groups,
    row_scales,
    row_step,
    spread_scales,
)
from qplug.api.scheme import (
    FLOAT_MAX,
    FLOAT_STEP,
    FLOATS,
    QuantArgs,
    all_finite_max,
)
from qplug.numerics.chunks import in_chunks
from qplug.numerics.scale_formats import (
    EXPONENT_BITS,
)
from qplug.numerics.scales import global_scale_of, scale_of

# The float formats that torch has, narrow ones first. torch rounds to them as ``round_floats``
# does.
_FLOAT_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def round_to_nearest(weight: Tensor, args: QuantArgs) -> QuantizedWeight:
    """The nearest codes of ``weight: [out, in]`` under scales that cover its range.

    Raises QplugError if a weight is NaN or infinite, or if groups do not divide the width.
    """
    return nearest(Linear("", weight, args))


def nearest(linear: Linear) -> QuantizedWeight:
    """The nearest codes of ``linear`` under ``scale_of(linear)``."""
    global_scale = global_scale_of(linear)
    scale, zero = scale_of(replace(linear, global_scale=global_scale))
    codes = quantize(linear.weight, scale, zero, linear.args)
    return QuantizedWeight(codes, scale, zero, linear.args, global_scale=global_scale)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs) -> Tensor:
    """The nearest codes ``[out, in]`` of ``weight: [out, in]`` under given scales and zero points.

    ``scale`` and ``zero``: ``args.scale_shape``; the result is ``code_dtype(args)``.
    """
    codes = torch.empty(weight.shape, dtype=code_dtype(args), device=weight.device)
    scale = scale.expand(row_scales(weight, args))
    zeros = None if zero is None else zero.expand(scale.shape)
    for rows, groups in in_chunks(weight, args):
        groups /= spread_scales(scale[rows])
        if args.is_float:
            groups = round_floats(groups, args)
        else:
            groups.round_()
            if zeros is not None:
                groups += spread_scales(zeros[rows])
            groups.clamp_(*args.code_range)
        step = row_step(args)
        part = codes[rows.start * step : rows.stop * step]
        part.copy_(out_of_groups(groups, weight.shape[1], part.shape[0]))
    return codes


def round_codes(
    values: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs
) -> tuple[Tensor, Tensor]:
    """Codes of float32 ``values`` and the values that the codes stand for, both float32.

    ``scale`` and ``zero`` broadcast to the shape of ``values``.
    """
    codes = values / scale
    if args.is_float:
        codes = round_floats(codes, args).float()
        return codes, codes * scale
    codes = codes.round_()
    if zero is not None:
        codes = codes.add_(zero).clamp_(*args.code_range)
        return codes, (codes - zero) * scale
    codes = codes.clamp_(*args.code_range)
    return codes, codes * scale


def round_floats(values: Tensor, args: QuantArgs) -> Tensor:
    """The nearest values of a float format, in ``code_dtype(args)``; overwrites ``values``.

    ``values``: float32, of any shape. Values that are too large saturate. Of two equally near ones
    the one with the even mantissa is taken; if a format has no mantissa bit, the larger one, or
    zero (IEEE 754-2019, 4.3.1). ``args.use_qtorch`` rounds as qtorch does instead.
    """
    exponent, mantissa = FLOATS[args.dtype]
    if args.use_qtorch:
        from qplug.numerics.qtorch import round_by_qtorch

        return round_by_qtorch(values, exponent, mantissa).to(code_dtype(args))
    values.clamp_(-FLOAT_MAX[args.dtype], FLOAT_MAX[args.dtype])
    if args.dtype in _FLOAT_DTYPES:
        return values.to(_FLOAT_DTYPES[args.dtype])
    step = float_steps(values, args)
    return values.div_(step).round_().mul_(step).to(code_dtype(args))


def float_steps(values: Tensor, args: QuantArgs) -> Tensor:
    """The distance between neighbours of a float format at each of ``values``, float32."""
    # Without sign and mantissa, a float32 is the power of two at or below its magnitude: 2^M steps.
    step = (values.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return step.mul_(2.0 ** -FLOATS[args.dtype][1]).clamp_(min=FLOAT_STEP[args.dtype])


def code_dtype(args: QuantArgs) -> torch.dtype:
    """The dtype of codes: int8 if symmetric, uint8 if asymmetric.

    Codes of float formats have the narrowest dtype that holds every value of the format.
    """
    if not args.is_float:
        return torch.int8 if args.symmetric else torch.uint8
    exponent, mantissa = FLOATS[args.dtype]
    top = all_finite_max(exponent, mantissa) if args.use_qtorch else FLOAT_MAX[args.dtype]
    for name, dtype in _FLOAT_DTYPES.items():
        fits = mantissa <= FLOATS[name][1] and top <= FLOAT_MAX[name]
        if fits and FLOAT_STEP[args.dtype] >= FLOAT_STEP[name]:
            return dtype
    return torch.bfloat16
