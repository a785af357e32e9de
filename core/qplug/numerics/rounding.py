"""The arithmetic that all algorithms share: scales, codes, and back. Everything is float32.

For an integer grid with codes ``qmin .. qmax`` and a weight ``w`` under scale ``s``::

    symmetric     s = max|w| / ((qmax - qmin) / 2)       q = clamp(round(w / s))
    asymmetric    s = (max(w, 0) - min(w, 0)) / qmax     z = round(-min(w, 0) / s)
                                                         q = clamp(round(w / s) + z)

and ``w' = (q - z) * s``. A float grid has ``s = max|w| / max(grid)`` and saturates. Rounding is to
nearest, ties to even. Scales in e4m3 are rounded as multiples of a power of two, ``global_scale``;
those in e8m0 are powers of two themselves. (Arithmetic in bfloat16 puts 8 to 10 % of int8 codes one
step off.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qplug.api import Linear, QuantizedWeight
from qplug.api.scheme import (
    E8M0_SCALES,
    FLOAT_MAX,
    FLOAT_STEP,
    FLOATS,
    QuantArgs,
    Scheme,
    all_finite_max,
)
from qplug.errors import QplugError
from qplug.numerics.scale_formats import (
    EXPONENT_BITS,
    SMALLEST,
    as_stored,
    global_scale,
    largest_code,
    power_of_two,
)

# Elements worked on at a time. On a CPU a chunk and its copies stay in a core's cache, which takes
# a quarter of the time of whole-matrix passes; a GPU wants much to do at once.
_CPU_CHUNK, _GPU_CHUNK = 1 << 19, 1 << 26

# The float formats that torch has, narrow ones first. It rounds to them as ``round_floats`` does.
_FLOAT_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def round_to_nearest(weight: Tensor, args: QuantArgs) -> QuantizedWeight:
    """The nearest codes of ``weight: [out, in]`` under scales that cover its range.

    Raises QplugError if a weight is NaN or infinite, or the group does not divide the width.
    """
    return nearest(Linear("", weight, args))


def scale_of(linear: Linear) -> tuple[Tensor, Tensor | None]:
    """The scales that an algorithm chose for ``linear``; if none did, those that cover it."""
    if linear.scale is not None:
        return linear.scale, linear.zero
    return minmax_scale(linear.weight, linear.args, linear.global_scale)


def nearest(linear: Linear) -> QuantizedWeight:
    """The nearest codes of ``linear`` under ``scale_of(linear)``."""
    unit = global_scale_of(linear)
    scale, zero = scale_of(replace(linear, global_scale=unit))
    codes = quantize(linear.weight, scale, zero, linear.args)
    return QuantizedWeight(codes, scale, zero, linear.args, global_scale=unit)


def global_scale_of(linear: Linear) -> Tensor | None:
    """The global scale of ``linear``, float32 ``[1]``; None if its scales have one level.

    It is the one that was chosen for it; if none was, the smallest that covers its weight.
    """
    if not linear.args.two_level or linear.global_scale is not None:
        return linear.global_scale
    return global_scale(linear.weight.abs().amax().float(), linear.args)


def minmax_scale(
    weight: Tensor, args: QuantArgs, unit: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points if ``args`` is asymmetric, that cover ``weight: [out, in]``.

    Scales: float32 ``args.scale_shape``, positive, exact in ``args.scale_dtype`` (if that is e4m3,
    as multiples of the global scale ``unit``: by default the one that covers ``weight``). Zero
    points: uint8 of that shape. Raises QplugError as ``round_to_nearest``.
    """
    return range_scale(*weight_range(weight, args), args, unit)


def weight_range(weight: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor]:
    """The least and the greatest weight under each scale, and zero: float32 ``args.scale_shape``.

    Raises QplugError as ``round_to_nearest``.
    """
    check_width(weight.shape[1], args)
    low = torch.empty(_row_scales(weight, args), device=weight.device)
    high = torch.empty_like(low)
    for rows, groups in _chunks(weight, args):
        low[rows], high[rows] = groups.amin(_AXES), groups.amax(_AXES)
    if not torch.isfinite(high - low).all():
        raise QplugError("the weight has NaN or infinite values")
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    if args.strategy == "tensor":
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    return low, high


def range_scale(
    low: Tensor, high: Tensor, args: QuantArgs, unit: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The scales, and zero points, of ranges from ``low <= 0`` to ``high >= 0``.

    ``unit``: the global scale, if scales have two levels; by default one that covers all ranges.
    """
    if args.symmetric:
        peak = torch.maximum(-low, high)
        if args.scale_dtype == E8M0_SCALES:
            return power_of_two(peak, args), None
        return as_stored(peak / largest_code(args), args, unit), None
    top = args.code_range[1]
    scale = as_stored((high - low) / top, args)
    return scale, (-low / scale).round_().clamp_(0, top).to(torch.uint8)


def clip_to_scale(weight: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs) -> Tensor:
    """``weight: [out, in]``, float32, cut in place to the range that its scales were made for.

    ``minmax_scale`` of the result gives the same scales back where a weight reached the range.
    """
    groups, spread = in_groups(weight, args), scale.expand(_row_scales(weight, args))
    top = largest_code(args) if args.symmetric else args.code_range[1]
    low = torch.full_like(spread, -top) if zero is None else -zero.float().expand(spread.shape)
    high = torch.full_like(spread, top) if zero is None else top + low
    cut = torch.clamp(groups, _spread(low * spread), _spread(high * spread))
    return weight.copy_(out_of_groups(cut, weight.shape[1], weight.shape[0]))


def quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs) -> Tensor:
    """Nearest codes ``[out, in]`` of ``weight: [out, in]`` under given scales and zero points."""
    codes = torch.empty(weight.shape, dtype=code_dtype(args), device=weight.device)
    scale = scale.expand(_row_scales(weight, args))
    zeros = None if zero is None else zero.expand(scale.shape)
    for rows, groups in _chunks(weight, args):
        groups /= _spread(scale[rows])
        if args.is_float:
            groups = round_floats(groups, args)
        else:
            groups.round_()
            if zeros is not None:
                groups += _spread(zeros[rows])
            groups.clamp_(*args.code_range)
        step = _row_step(args)
        part = codes[rows.start * step : rows.stop * step]
        part.copy_(out_of_groups(groups, weight.shape[1], part.shape[0]))
    return codes


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The float32 weight ``[out, in]`` that codes stand for: ``(codes - zero) * scale``."""
    return dequantize_with(weight.codes, weight.scale, weight.zero, weight.args)


def dequantize_with(codes: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs) -> Tensor:
    """``dequantize`` of codes ``[out, in]`` that are not yet a QuantizedWeight."""
    values = codes.float()
    scale = scale.expand(_row_scales(values, args))
    groups = in_groups(values, args)
    if zero is not None:
        groups = groups - _spread(zero.expand(scale.shape))
    return out_of_groups(groups * _spread(scale), values.shape[1], values.shape[0])


def round_codes(
    values: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs
) -> tuple[Tensor, Tensor]:
    """Codes of float32 ``values`` under scales of the same shape, and what the codes stand for."""
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
    """The nearest values of a float format, in ``code_dtype(args)``; ``values`` is used up.

    ``values``: float32, of any shape. What is too large saturates. Of two that are equally near,
    the one with the even mantissa is taken; where a format has no mantissa bit, the larger one, or
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
    """The distance of neighbouring values of a float format at each of ``values``, float32."""
    # Without sign and mantissa, a float32 is the power of two at or below its magnitude: 2^M steps.
    step = (values.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return step.mul_(2.0 ** -FLOATS[args.dtype][1]).clamp_(min=FLOAT_STEP[args.dtype])


def per_column(
    scale: Tensor, zero: Tensor | None, args: QuantArgs, columns: Tensor, rows: int
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of each weight in some columns of a matrix with ``rows`` rows.

    ``columns``: int64 ``[n]``. Gives float32 ``[n, rows]``, a column a run of memory.
    """
    tall, wide = args.block or (1, args.group_size)
    places = columns // wide if wide else torch.zeros_like(columns)

    def spread(values: Tensor) -> Tensor:
        picked = values.T[places].float()
        if args.strategy == "tensor":
            return picked.expand(-1, rows).contiguous()
        return picked.repeat_interleave(tall, dim=1)[:, :rows].contiguous()

    return spread(scale), None if zero is None else spread(zero)


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """``||W' - W|| / ||W||`` (Frobenius) of ``weight: [out, in]``; 0 if both are zero."""
    args, step = quantized.args, _row_step(quantized.args)
    scale = quantized.scale.expand(_row_scales(weight, args))
    zero = None if quantized.zero is None else quantized.zero.expand(scale.shape)
    error = norm = 0.0
    for rows, groups in _chunks(weight, args):
        codes = quantized.codes[rows.start * step : rows.stop * step]
        part = in_groups(codes.float(), args)
        if zero is not None:
            part -= _spread(zero[rows])
        part *= _spread(scale[rows])
        norm += groups.square().sum(dtype=torch.float64).item()
        # What ragged blocks are filled with is no error.
        off = out_of_groups(part.sub_(groups), codes.shape[1], codes.shape[0])
        error += off.square_().sum(dtype=torch.float64).item()
    return (error / norm) ** 0.5 if norm else float(error > 0)


def relative_output_error(weight: Tensor, quantized: QuantizedWeight, gram: Tensor) -> float:
    """``||XW'ᵀ - XWᵀ|| / ||XWᵀ||`` over all tokens, of ``gram: [in, in]``, the sum of ``xᵀx``."""
    norm = output_error(weight.float(), gram)
    error = output_error(dequantize(quantized).sub_(weight), gram)
    return (max(error, 0.0) / norm) ** 0.5 if norm > 0 else 0.0


def output_error(difference: Tensor, gram: Tensor) -> float:
    """``tr(D G Dᵀ)``: the squared error of a linear's output over all tokens, for errors ``D``.

    ``difference: [out, in]``, ``gram: [in, in]``. On a GPU the product is one of bfloat16 numbers
    summed in float32: what rounding does to 10^8 terms is far below the differences looked for.
    """
    halved = gram.bfloat16() if difference.is_cuda else gram
    total = torch.zeros((), dtype=torch.float64, device=difference.device)
    for part in difference.split(max(1, _GPU_CHUNK // 4 // difference.shape[1])):
        if difference.is_cuda:
            product = torch.mm(part.bfloat16(), halved, out_dtype=torch.float32)
        else:
            product = part @ halved
        total += product.mul_(part).sum(dtype=torch.float64)
    return total.item()


def fake_quantize_activations(x: Tensor, args: QuantArgs, scale: Tensor | None = None) -> Tensor:
    """``x: [..., width]`` rounded as an engine rounds it at run time, in the dtype of ``x``.

    One scale a token, or a token and ``group_size`` columns; or, for all of ``x``, the static
    ``scale`` (one element), which without one given covers ``x``; in NVFP4 both, and the static one
    is the global scale. Engines divide int8 activations by ``max|x| / 127``, not 127.5 as for
    weights. Asymmetric ones have the scale and zero point of ``range_scale``, each token its own.
    Raises QplugError if groups do not divide the width.
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
        unit = input_scale(peak.amax(), args) if scale is None and x.numel() else scale
        scale = as_stored(peak / largest_code(args), args, unit)
    else:
        scale = input_scale(peak, args) if scale is None else scale.float()
    if args.is_float:
        codes = round_floats(groups / scale, args).float()
    else:
        codes = (groups / scale).round_().clamp_(*args.code_range)
    rounded: Tensor = (codes * scale).flatten(-2).to(x.dtype)
    return rounded


def _round_from_zero_points(groups: Tensor, args: QuantArgs) -> Tensor:
    """Float32 ``groups: [..., n]`` rounded asymmetrically, under a scale for each of them."""
    if args.strategy == "tensor":
        raise NotImplementedError(f"activations {args}")
    low = groups.amin(-1, keepdim=True).clamp_(max=0)
    scale, zero = range_scale(low, groups.amax(-1, keepdim=True).clamp_(min=0), args)
    assert zero is not None
    _, rounded = round_codes(groups, scale, zero.float(), args)
    return rounded


def input_scale(peak: Tensor, args: QuantArgs) -> Tensor:
    """Float32 scales under which inputs of magnitudes up to ``peak`` are not clipped, positive.

    In NVFP4, where ``peak`` has one element, the global scale ``[1]``.
    """
    if args.two_level:
        return global_scale(peak, args)
    return (peak.float() / activation_top(args)).clamp_(min=SMALLEST["float32"])


def activation_top(args: QuantArgs) -> float:
    """The code that the largest magnitude of an input gets: 127 of int8, 448 of e4m3."""
    return FLOAT_MAX[args.dtype] if args.is_float else args.code_range[1]


def check_width(width: int, args: QuantArgs) -> None:
    """Raises QplugError if groups of ``args`` do not divide rows of ``width`` weights."""
    if args.group_size is not None and width % args.group_size:
        raise QplugError(f"groups of {args.group_size} do not divide its width, {width}")


def check_widths(name: str, width: int, scheme: Scheme) -> None:
    """Raises QplugError if groups of weights or of inputs do not divide the width of a linear."""
    for args, advice in (
        (scheme.weights, "choose another --group-size"),
        (scheme.activations, "choose a --scheme without groups of inputs, or --ignore it"),
    ):
        try:
            if args is not None:
                check_width(width, args)
        except QplugError as error:
            raise QplugError(f"{name}: {error}; {advice}") from None


def code_dtype(args: QuantArgs) -> torch.dtype:
    """The dtype of codes: int8 if symmetric, uint8 if not.

    Those of floats have the narrowest dtype that holds every value of the format.
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


# --- groups: every strategy is seen as [row step, rows in it, group, columns in it] ---------------

_AXES = (1, 3)


def _row_step(args: QuantArgs) -> int:
    return args.block[0] if args.block else 1


def _row_scales(weight: Tensor, args: QuantArgs) -> tuple[int, int]:
    """The shape of scales, one for each row step at least (``tensor`` is worked on row by row)."""
    if args.strategy == "tensor":
        return weight.shape[0], 1
    return args.scale_shape((weight.shape[0], weight.shape[1]))


def per_row_scale(scale: Tensor, weight: Tensor, args: QuantArgs) -> Tensor:
    """``scale: args.scale_shape`` as ``[row step, 1, group, 1]``, to go with ``in_groups``."""
    return _spread(scale.expand(_row_scales(weight, args)))


def in_groups(part: Tensor, args: QuantArgs) -> Tensor:
    """``[rows, in]`` as ``[row step, rows, group, columns]``; ragged blocks are filled with 0."""
    if args.block:
        tall, wide = args.block
        down, right = -part.shape[0] % tall, -part.shape[1] % wide
        if down or right:
            part = torch.nn.functional.pad(part, (0, right, 0, down))
        return part.view(part.shape[0] // tall, tall, part.shape[1] // wide, wide)
    return part.view(part.shape[0], 1, -1, args.group_size or part.shape[1])


def out_of_groups(groups: Tensor, width: int, rows: int) -> Tensor:
    """The inverse of ``in_groups``: ``[rows, width]``."""
    return groups.flatten(2).flatten(0, 1)[:rows, :width]


def _spread(scale: Tensor) -> Tensor:
    return scale[:, None, :, None]


def _chunks(weight: Tensor, args: QuantArgs) -> Iterator[tuple[slice, Tensor]]:
    """Row steps of ``weight`` and their float32 groups, a few rows at a time."""
    step = _row_step(args)
    total = -(-weight.shape[0] // step)
    chunk = _CPU_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK
    size = max(1, chunk // (weight.shape[1] * step))
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        part = weight[rows.start * step : rows.stop * step]
        # A copy even of float32 weights: callers work in place.
        yield rows, in_groups(part.to(torch.float32, copy=True), args)
