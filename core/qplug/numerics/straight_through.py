"""Rounding that gradients go through, for what is learned (public).

The derivative of rounding is taken for 1 (the straight-through estimator, arXiv 1308.3432). So for
codes ``q`` of ``w' = (q - z) * s`` that are not clipped, ``dw'/dw = 1`` and
``dw'/ds = q - z - w / s`` (arXiv 1902.08153, equation 3); where they are, ``dw'/dw = 0`` and
``dw'/ds = q - z``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qplug.api.groups import in_groups, out_of_groups, per_row_scale
from qplug.api.scheme import FLOAT_MAX, QuantArgs
from qplug.numerics import scales
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.rounding import float_steps, round_floats
from qplug.numerics.scale_formats import largest_code


def fake_quantize(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    args: QuantArgs,
    offset: Tensor | None = None,
) -> Tensor:
    """``weight: [out, in]``, float32, rounded under ``scale`` and ``zero``, and differentiable.

    ``scale`` and ``zero``: float32 ``args.scale_shape``; zero points are whole numbers. ``offset:
    [out, in]`` is added before rounding, in steps of the grid: within half a step it decides
    whether a weight is rounded up or down. Gradients reach all four. The values are those of
    ``qplug.numerics.dequantize`` of ``quantize``.
    """
    made: Tensor = _FakeQuantize.apply(weight, scale, zero, offset, args)  # type: ignore[no-untyped-call]
    return made


def range_scale_with_gradients(
    low: Tensor, high: Tensor, args: QuantArgs, unit: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``qplug.numerics.range_scale`` with gradients; zero points are float32."""
    stored, _ = scales.range_scale(low.detach(), high.detach(), args, unit)
    if args.symmetric:
        return _straight(torch.maximum(-low, high) / largest_code(args), stored), None
    top = args.code_range[1]
    scale = _straight((high - low) / top, stored)
    zero = -low / scale
    return scale, _straight(zero, zero.round()).clamp(0, top)


def stretched(
    scale: Tensor,
    zero: Tensor | None,
    factors: Sequence[Tensor],
    args: QuantArgs,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of ranges whose ends lie ``factors`` times as far out, with gradients.

    ``factors``: that of the low end and that of the high one, or one if ``args`` is symmetric,
    float32 ``args.scale_shape``. ``unit`` as in ``range_scale``.
    """
    if zero is None:
        end = scale * largest_code(args) * factors[0]
        return range_scale_with_gradients(-end, end, args, unit)
    low, high = -zero * scale, (args.code_range[1] - zero) * scale
    return range_scale_with_gradients(low * factors[0], high * factors[-1], args, unit)


def ranges_with_gradients(weight: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor]:
    """``qplug.numerics.weight_range`` of ``weight: [out, in]``, float32, with gradients."""
    groups = in_groups(weight, args)
    low, high = groups.amin((1, 3)).clamp(max=0), groups.amax((1, 3)).clamp(min=0)
    if args.strategy == "tensor":
        return low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    return low, high


def round_inputs(
    x: Tensor, args: QuantArgs, scale: Tensor | None = None, *, through_peaks: bool = False
) -> Tensor:
    """``qplug.numerics.fake_quantize_activations`` with a gradient: none where ``x`` is clipped.

    ``through_peaks``: where the scale is that which covers ``x``, the largest magnitudes also have
    the gradient of the scale that they make, ``dx'/ds = (x' - x) / s`` for a rounded ``x'``.
    """
    made: Tensor = _RoundInputs.apply(x, scale, args, through_peaks)  # type: ignore[no-untyped-call]
    return made


def _straight(values: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradients of ``values``."""
    return values + (rounded - values).detach()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        offset: Tensor | None,
        args: QuantArgs,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero, offset)
        ctx.args = args
        spread, zeros = spread_scales(scale, weight, args), spread_scales(zero, weight, args)
        quotient = in_groups(weight, args) / spread
        codes, _ = _codes(quotient, zeros, offset, args)
        return out_of_groups(codes * spread, weight.shape[1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero, offset = ctx.saved_tensors
        args: QuantArgs = ctx.args
        wanted = ctx.needs_input_grad
        spread, zeros = spread_scales(scale, weight, args), spread_scales(zero, weight, args)
        grad = in_groups(grads[0].contiguous(), args)
        quotient = in_groups(weight, args) / spread
        codes, inside = _codes(quotient, zeros, offset, args)
        through = grad * inside
        shape = weight.shape
        of_weight = out_of_groups(through, shape[1], shape[0]) if wanted[0] else None
        of_scale = of_zero = of_offset = None
        if wanted[3]:
            steps = (through * spread).mul_(_steps(quotient, args))
            of_offset = out_of_groups(steps, shape[1], shape[0])
        if wanted[2]:
            of_zero = _sum((through - grad).mul_(spread), scale)
        if wanted[1]:
            of_scale = _sum(codes.mul_(grad).sub_(quotient.mul_(through)), scale)
        return of_weight, of_scale, of_zero, of_offset, None


class _RoundInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, args: QuantArgs, through_peaks: bool
    ) -> Tensor:
        made = fake_quantize_activations(x, args, scale)
        ctx.args = args
        if scale is None and through_peaks:
            ctx.save_for_backward(None, x, made)
        elif scale is None:  # it covers x
            ctx.save_for_backward(None)
        else:
            low, high = _ends(args)
            ctx.save_for_backward((x >= low * scale) & (x <= high * scale))
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, *peaked = ctx.saved_tensors
        if peaked:
            x, made = peaked
            return grads[0] + _through_peaks(grads[0], x, made, ctx.args), None, None, None
        return grads[0] if inside is None else grads[0] * inside, None, None, None


def _through_peaks(grad: Tensor, x: Tensor, made: Tensor, args: QuantArgs) -> Tensor:
    """What the peaks of ``x`` have of ``grad`` through the scales that they make.

    ``s = |x_peak| / c`` gives ``dx'/dx_peak = (x' - x) / x_peak``.
    """
    size = x.numel() if args.strategy == "tensor" else args.group_size or x.shape[-1]
    values = x.float().reshape(-1, size)
    off = (made.float().reshape(-1, size) - values) * grad.float().reshape(-1, size)
    places = values.abs().argmax(1, keepdim=True)
    peaks = values.gather(1, places)
    share = torch.where(peaks == 0, peaks, off.sum(1, keepdim=True) / peaks)
    return torch.zeros_like(values).scatter_(1, places, share).view_as(x).to(grad.dtype)


def _codes(
    quotient: Tensor, zeros: Tensor | None, offset: Tensor | None, args: QuantArgs
) -> tuple[Tensor, Tensor]:
    """Codes less zero points, in float32 and groups, and whether each is not clipped."""
    moved = quotient
    if offset is not None:
        moved = quotient + in_groups(offset, args) * _steps(quotient, args)
    low, high = _ends(args)
    if args.is_float:
        inside = (moved >= low) & (moved <= high)
        return round_floats(moved.clone(), args).float(), inside
    codes = moved.round()
    if zeros is None:
        return codes.clamp(low, high), (codes >= low) & (codes <= high)
    codes += zeros
    inside = (codes >= low) & (codes <= high)
    return codes.clamp_(low, high).sub_(zeros), inside


def _steps(quotient: Tensor, args: QuantArgs) -> Tensor | float:
    """The distance of neighbouring values of the grid at each of ``quotient``."""
    return float_steps(quotient, args) if args.is_float else 1.0


def _ends(args: QuantArgs) -> tuple[float, float]:
    if args.is_float:
        return -FLOAT_MAX[args.dtype], FLOAT_MAX[args.dtype]
    return args.code_range


def spread_scales(values: Tensor | None, weight: Tensor, args: QuantArgs) -> Any:
    """Scales or zero points as ``[row step, 1, group, 1]``, to go with groups."""
    return None if values is None else per_row_scale(values.float(), weight, args)


def _sum(of_groups: Tensor, scale: Tensor) -> Tensor:
    """The gradient of ``scale`` from those of its weights, in groups."""
    summed = of_groups.sum((1, 3))
    return summed.sum().reshape(1, 1) if summed.shape != scale.shape else summed
