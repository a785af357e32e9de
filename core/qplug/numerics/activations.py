"""Rounding of activations as an engine rounds them while the model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug.api.scheme import (
    E8M0_SCALES,
    FLOAT_MAX,
    QuantArgs,
)
from qplug.numerics.rounding import round_codes, round_floats
from qplug.numerics.scale_formats import (
    SMALLEST,
    as_stored,
    covering_global_scale,
    covering_power,
    largest_code,
)
from qplug.numerics.scales import check_width, range_scale

if TYPE_CHECKING:
    from torch import Tensor


def fake_quantize_activations(x: Tensor, args: QuantArgs, scale: Tensor | None = None) -> Tensor:
    """``x: [..., width]`` rounded as an engine rounds it at run time, in the dtype of ``x``.

    Each token has one scale, or one for each ``group_size`` columns; or all of ``x`` has the static
    ``scale``, float32 ``[1]``, and without one a scale that covers ``x``. In NVFP4 ``scale`` is the
    global scale of the scales of groups. Integers are divided by ``max|x| / 127`` in 8 bits and
    ``max|x| / 7`` in 4, as engines do (see ``activation_top``), not by ``max|x| / 127.5`` and
    ``max|x| / 7.5`` like weights. Asymmetric activations have the scale and
    zero point of ``range_scale``, for each token. Raises QplugError if groups do not divide the
    width, NotImplementedError for a combination that no scheme has.
    """
    if args.strategy != "tensor" and not args.dynamic:
        raise NotImplementedError(f"activations {args}")
    if args.strategy == "tensor":
        groups = x.float().unsqueeze(-2)
    else:
        check_width(x.shape[-1], args)
        groups = x.float().unflatten(-1, (-1, args.group_size or x.shape[-1]))
    if not args.symmetric:
        return _round_from_zero_points(groups, args).flatten(-2).to(x.dtype)
    if args.strategy == "tensor":
        peak = groups.abs().amax() if scale is None and x.numel() else groups.new_zeros(())
    else:
        peak = groups.abs().amax(-1, keepdim=True)
    if args.two_level:
        global_scale = input_scale(peak.amax(), args) if scale is None and x.numel() else scale
        scale = as_stored(peak / largest_code(args), args, global_scale)
    else:
        scale = input_scale(peak, args) if scale is None else scale.float()
    if args.is_float:
        codes = round_floats(groups / scale, args).float()
    else:
        codes = (groups / scale).round_().clamp_(*args.code_range)
    rounded: Tensor = (codes * scale).flatten(-2).to(x.dtype)
    return rounded


def _round_from_zero_points(groups: Tensor, args: QuantArgs) -> Tensor:
    """Float32 ``groups: [..., n]`` rounded asymmetrically, each under a scale of its own."""
    if args.strategy == "tensor":
        raise NotImplementedError(f"activations {args}")
    low = groups.amin(-1, keepdim=True).clamp_(max=0)
    scale, zero = range_scale(low, groups.amax(-1, keepdim=True).clamp_(min=0), args)
    assert zero is not None
    _, rounded = round_codes(groups, scale, zero.float(), args)
    return rounded


def input_scale(peak: Tensor, args: QuantArgs) -> Tensor:
    """The positive float32 scales under which inputs of magnitudes up to ``peak`` are not clipped.

    Shaped like ``peak``. In NVFP4 ``peak`` has one element, and the result is the global scale
    ``[1]``. In MX formats the scales are powers of two.
    """
    if args.two_level:
        return covering_global_scale(peak, args)
    if args.scale_dtype == E8M0_SCALES:
        return covering_power(peak, args)
    return (peak.float() / activation_top(args)).clamp_(min=SMALLEST["float32"])


def activation_top(args: QuantArgs) -> float:
    """The code of the largest magnitude of an input: 127 for int8, 7 for int4, 448 for e4m3.

    This is what engines divide by: 127 in vLLM's int8 kernels (``scaled_int8_quant``, the same on
    CPUs, and ``per_token_quant_int8``) and in SGLang's, and ``2^(bits - 1) - 1`` for int8 and int4
    in Humming, which runs W4A4 in vLLM (``target_maximum`` in quantization.cuh of 0.1.19).
    compressed-tensors divides by half the number of steps, 127.5 and 7.5 (``calculate_qparams``):
    it rounds so in its own simulation, and no engine asks it.
    """
    return FLOAT_MAX[args.dtype] if args.is_float else args.code_range[1]
