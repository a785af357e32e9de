"""Scales as files hold them: in a dtype, as multiples of a global scale, or powers of two.

All arithmetic is float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qplug.api.scheme import E4M3_SCALES, E8M0_SCALES, FLOAT_MAX, FLOAT_STEP, FLOATS, QuantArgs

EXPONENT_BITS = 0x7F800000  # of a float32
_MANTISSA_BITS = 23

#: The smallest positive scale of each dtype, which groups of zeros get. For e4m3 it is in units of
#: the global scale.
SMALLEST = {
    "float16": 2.0**-24,
    "bfloat16": 2.0**-126,
    "float32": 2.0**-126,
    E4M3_SCALES: FLOAT_STEP["e4m3"],
    E8M0_SCALES: 2.0**-126,
}
_BIAS = 127
#: The exponent of the smallest global scale, whose products with e4m3 are still normal numbers.
_SMALLEST_GLOBAL = -112


def largest_code(args: QuantArgs) -> float:
    """The end of a symmetric grid in units of the scale; 127.5 for int8, between its two ends."""
    if args.is_float:
        return FLOAT_MAX[args.dtype]
    low, high = args.code_range
    return (high - low) / 2


def as_stored(scale: Tensor, args: QuantArgs, global_scale: Tensor | None = None) -> Tensor:
    """Positive scales rounded to values of ``args.scale_dtype``, float32.

    ``global_scale``: ``[1]``, if ``args.two_level``; by default one that covers all scales.
    """
    if args.scale_dtype == E8M0_SCALES:
        return power_of_two(scale * largest_code(args), args)
    if args.two_level:
        if global_scale is None:
            global_scale = covering_global_scale(scale.amax() * largest_code(args), args)
        local = (scale / global_scale).clamp_(max=FLOAT_MAX["e4m3"]).to(torch.float8_e4m3fn).float()
        return local.clamp_(min=SMALLEST[args.scale_dtype]) * global_scale
    stored = scale.to(getattr(torch, args.scale_dtype)).float()
    return stored.clamp_(min=SMALLEST[args.scale_dtype])


def covering_global_scale(peak: Tensor, args: QuantArgs) -> Tensor:
    """The least power of two under which scales in e4m3 cover magnitudes up to ``peak``: ``[1]``.

    A power of two is exact as a factor and as a divisor (formats store one or the other), also in
    half precision, and so are its products with scales.
    """
    ratio = peak.float() / (FLOAT_MAX["e4m3"] * largest_code(args))
    return _least_power(ratio, _SMALLEST_GLOBAL).reshape(1)


def covering_power(peak: Tensor, args: QuantArgs) -> Tensor:
    """The least powers of two under which magnitudes up to ``peak`` do not saturate, float32.

    Shaped like ``peak``. Engines compute the scales of inputs in MX formats so
    (``mxfp8_e4m3_quantize`` of vLLM 0.33, ``cvt_warp_fp16_to_fp4`` of FlashInfer 0.7).
    """
    ratio = (peak.float() / largest_code(args)).clamp_(min=SMALLEST[E8M0_SCALES])
    return _least_power(ratio, 1 - _BIAS)


def _least_power(values: Tensor, smallest: int) -> Tensor:
    """The least powers of two that are not below ``values``, with exponents from ``smallest``."""
    mantissa, exponent = torch.frexp(values)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # exactly a power of two
    exponent = exponent.clamp(smallest, _BIAS)
    return ((exponent + _BIAS) << _MANTISSA_BITS).view(torch.float32)


def power_of_two(peak: Tensor, args: QuantArgs) -> Tensor:
    """The scales of an MX format for groups whose largest magnitudes are ``peak``, float32.

    For e2m1, ``peak`` is first rounded to one bit of mantissa, up from 1.75 times a power of two;
    the scale then maps its exponent to the largest exponent of the grid. compressed-tensors does
    the same; OCP MX 1.0 (6.3) never rounds up. Magnitudes up to 7 times the scale saturate. In
    formats with more bits of mantissa, nothing saturates: see ``covering_power``.
    """
    if args.dtype != "e2m1":
        return covering_power(peak, args)
    mantissa = FLOATS[args.dtype][1]
    half = 1 << (_MANTISSA_BITS - mantissa - 1)
    bits = peak.float().contiguous().view(torch.int32) + half
    top = math.frexp(FLOAT_MAX[args.dtype])[1] - 1
    powers = (bits & EXPONENT_BITS).view(torch.float32)
    return (powers * 2.0**-top).clamp_(min=SMALLEST[E8M0_SCALES])
