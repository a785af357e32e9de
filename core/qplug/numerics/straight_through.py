"""Rounding with gradients, for algorithms that learn.

The derivative of rounding is taken to be 1 (the straight-through estimator, arXiv 1308.3432). For
codes ``q`` of ``w' = (q - z) * s`` that are not clipped, ``dw'/dw = 1`` and
``dw'/ds = q - z - w / s`` (arXiv 1902.08153, equation 3); for clipped ones, ``dw'/dw = 0`` and
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

#: Weights of a group that a program on a GPU holds at once.
_LONGEST_GROUP = 1 << 14


def fake_quantize(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    args: QuantArgs,
    offset: Tensor | None = None,
) -> Tensor:
    """``weight: [out, in]``, float32, rounded under ``scale`` and ``zero``, with gradients for all.

    ``scale`` and ``zero``: float32 ``args.scale_shape``; zero points are whole numbers. ``offset:
    [out, in]``, in steps of the grid, is added before rounding: within half a step it decides
    whether a weight is rounded up or down. Values are equal to ``quantize`` then ``dequantize``.
    """
    rounded: Tensor = _FakeQuantize.apply(weight, scale, zero, offset, args)  # type: ignore[no-untyped-call]
    return rounded


def range_scale_with_gradients(
    low: Tensor, high: Tensor, args: QuantArgs, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``range_scale`` with gradients; zero points are float32."""
    stored, _ = scales.range_scale(low.detach(), high.detach(), args, global_scale)
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
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of ranges whose ends are multiplied by ``factors``, with gradients.

    ``factors``: for the low and the high end, or one for both if ``args`` is symmetric, each
    float32 ``args.scale_shape``. ``global_scale``: as in ``range_scale``.
    """
    if zero is None:
        end = scale * largest_code(args) * factors[0]
        return range_scale_with_gradients(-end, end, args, global_scale)
    low, high = -zero * scale, (args.code_range[1] - zero) * scale
    return range_scale_with_gradients(low * factors[0], high * factors[-1], args, global_scale)


def round_in_range(
    weight: Tensor,
    parts: Sequence[Tensor],
    args: QuantArgs,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns ``weight`` rounded in ``parts`` of its own range, with gradients for both.

    ``weight: [out, in]``, float32. ``parts``: those of the low and of the high end that are kept,
    or one for both if ``args`` is symmetric, each float32 ``args.scale_shape``; without ``parts``
    the whole range is. ``dtype`` is the dtype of the result where one kernel computes it (integers
    on a GPU); elsewhere the result is float32.
    """
    if parts and weight.is_cuda and _in_one_kernel(weight, args):
        from qplug.numerics.straight_through_kernel import round_in_range_on_gpu

        return round_in_range_on_gpu(weight, parts, args, dtype)
    low, high = ranges_with_gradients(weight, args)
    if parts:
        low, high = low * parts[0], high * parts[-1]
    return fake_quantize(weight, *range_scale_with_gradients(low, high, args), args)


def ranges_with_gradients(weight: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor]:
    """``weight_range`` of ``weight: [out, in]``, float32, with gradients."""
    groups = in_groups(weight, args)
    low, high = groups.amin((1, 3)).clamp(max=0), groups.amax((1, 3)).clamp(min=0)
    if args.strategy == "tensor":
        return low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    return low, high


def round_inputs(
    x: Tensor, args: QuantArgs, scale: Tensor | None = None, *, through_peaks: bool = False
) -> Tensor:
    """``fake_quantize_activations`` with gradients, which are 0 where ``x`` is clipped.

    ``through_peaks``: if the scale covers ``x``, the largest magnitudes also get the gradient of
    the scale that they determine, ``dx'/ds = (x' - x) / s`` for a rounded ``x'``.
    """
    rounded: Tensor = _RoundInputs.apply(  # type: ignore[no-untyped-call]
        x, scale, args, through_peaks
    )
    return rounded


def _in_one_kernel(weight: Tensor, args: QuantArgs) -> bool:
    """Whether a GPU computes ``round_in_range`` of ``weight`` in one kernel."""
    return (
        not args.is_float
        and args.strategy in ("group", "channel")
        and args.scale_dtype in ("float16", "bfloat16", "float32")
        and (args.group_size or weight.shape[1]) <= _LONGEST_GROUP
    )


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
        rounded = fake_quantize_activations(x, args, scale)
        ctx.args = args
        if scale is None and through_peaks:
            ctx.save_for_backward(None, x, rounded)
        elif scale is None:  # it covers x
            ctx.save_for_backward(None)
        else:
            low, high = _ends(args)
            ctx.save_for_backward((x >= low * scale) & (x <= high * scale))
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, *peaked = ctx.saved_tensors
        if peaked:
            x, rounded = peaked
            return grads[0] + _through_peaks(grads[0], x, rounded, ctx.args), None, None, None
        return grads[0] if inside is None else grads[0] * inside, None, None, None


def _through_peaks(grad: Tensor, x: Tensor, rounded: Tensor, args: QuantArgs) -> Tensor:
    """The gradient of the peaks of ``x`` through the scales that they determine.

    ``s = |x_peak| / c`` gives ``dx'/dx_peak = (x' - x) / x_peak``.
    """
    size = x.numel() if args.strategy == "tensor" else args.group_size or x.shape[-1]
    values = x.float().reshape(-1, size)
    products = (rounded.float().reshape(-1, size) - values) * grad.float().reshape(-1, size)
    places = values.abs().argmax(1, keepdim=True)
    peaks = values.gather(1, places)
    share = torch.where(peaks == 0, peaks, products.sum(1, keepdim=True) / peaks)
    return torch.zeros_like(values).scatter_(1, places, share).view_as(x).to(grad.dtype)


def _codes(
    quotient: Tensor, zeros: Tensor | None, offset: Tensor | None, args: QuantArgs
) -> tuple[Tensor, Tensor]:
    """Codes minus zero points, float32 in groups, and a mask of codes that are not clipped."""
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
    """The distance between neighbours of the grid at each of ``quotient``."""
    return float_steps(quotient, args) if args.is_float else 1.0


def _ends(args: QuantArgs) -> tuple[float, float]:
    """The least and the greatest code of the grid."""
    if args.is_float:
        return -FLOAT_MAX[args.dtype], FLOAT_MAX[args.dtype]
    return args.code_range


def spread_scales(values: Tensor | None, weight: Tensor, args: QuantArgs) -> Any:
    """Scales or zero points as ``[row step, 1, group, 1]``, which broadcasts to groups."""
    return None if values is None else per_row_scale(values.float(), weight, args)


def _sum(of_groups: Tensor, scale: Tensor) -> Tensor:
    """The gradient of ``scale``: the sum of the gradients of its weights, given in groups."""
    summed = of_groups.sum((1, 3))
    return summed.sum().reshape(1, 1) if summed.shape != scale.shape else summed
