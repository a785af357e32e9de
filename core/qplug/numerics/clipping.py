"""How far to clip a weight's range, so that the layer's output changes least (public).

For a group of columns ``g`` of a row, candidate ``ŵ`` and the Gram matrix ``G`` of the input, the
error over all calibration tokens is ``(w - ŵ)_g G_gg (w - ŵ)_gᵀ``: only diagonal blocks of ``G``
matter, and no token is needed again. (AWQ, arXiv 2306.00978, section 3.2, clips by such a search.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qplug.api import InputGroup, Linear
from qplug.api.groups import dequantize, dequantize_with
from qplug.api.scheme import QuantArgs
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.losses import output_error
from qplug.numerics.rounding import nearest, quantize
from qplug.numerics.scale_formats import SMALLEST
from qplug.numerics.scales import global_scale_of, range_scale, weight_range

#: Weights whose errors are computed at a time.
_CHUNK = 1 << 26


def search_clip(linear: Linear, gram: Tensor, *, steps: int, smallest: float) -> None:
    """Choose ``linear.scale`` (and ``zero``): the least error on a grid of ranges.

    Ranges go from one that clips nothing to ``smallest`` times the full one, in ``steps`` steps,
    row by row and group by group. ``gram: [in, in]`` is that of the linear's input. Where rows
    share a scale (FP8 blocks and tensors) ranges stay full.
    """
    if linear.args.strategy not in ("group", "channel"):
        return
    rows = max(1, _CHUNK // linear.weight.shape[1])
    unit = global_scale_of(linear)
    scales, zeros = [], []
    for part in linear.weight.split(rows):
        aim = Linear(linear.name, part, linear.args, global_scale=unit)
        scale, zero = _search(aim, gram, steps, smallest)
        scales.append(scale)
        zeros.append(zero)
    linear.scale = torch.cat(scales)
    linear.zero = None if zeros[0] is None else torch.cat([z for z in zeros if z is not None])


def _search(
    linear: Linear, gram: Tensor, steps: int, smallest: float
) -> tuple[Tensor, Tensor | None]:
    weight, args = linear.weight, linear.args
    low, high = weight_range(weight, args)
    largest = unclipped_ratio(args)
    ratios = [largest - step * (largest - smallest) / steps for step in range(steps + 1)]
    candidates = [
        range_scale(low * ratio, high * ratio, args, linear.global_scale) for ratio in ratios
    ]
    scales = torch.stack([scale for scale, _ in candidates])
    zeros = None if args.symmetric else torch.stack([z for _, z in candidates if z is not None])
    blocks = diagonal_blocks(gram, args.group_size or weight.shape[1])
    errors = clip_errors(weight, scales, zeros, blocks, args)
    best = errors.argmin(0, keepdim=True)
    scale = scales.gather(0, best)[0]
    return scale, None if zeros is None else zeros.gather(0, best)[0]


def scaled_difference(
    linear: Linear, scale: Tensor, gram: Tensor, *, steps: int, smallest: float
) -> Tensor:
    """``Q(W diag(s)) diag(s)⁻¹ - W: [out, in]`` for scales ``s: [in]`` of the linear's input.

    The ranges of ``Q`` are those of ``search_clip``; with no ``steps`` they are the full ones.
    bfloat16 where a GPU does it in one pass, else float32.
    """
    weight, args = linear.weight, linear.args
    if weight.is_cuda and not args.is_float and args.group_size in (32, 64, 128):
        from qplug.numerics.clipping_kernel import scaled_difference_on_gpu

        return scaled_difference_on_gpu(
            weight,
            scale,
            diagonal_blocks(gram, args.group_size),
            args,
            steps=steps,
            largest=unclipped_ratio(args) if steps else 1.0,
            smallest=smallest,
            least=SMALLEST[args.scale_dtype],
        )
    scaled = Linear(linear.name, weight * scale, args)
    if steps:
        search_clip(scaled, gram / (scale[:, None] * scale), steps=steps, smallest=smallest)
    return dequantize(nearest(scaled)).div_(scale).sub_(weight)


def scaling_error(group: InputGroup, scale: Tensor, *, steps: int, smallest: float) -> float:
    """The squared error, over all tokens, of a group's linears if its input has scales ``[in]``.

    Of an expert, over those that are routed to it. Weights of fewer than 8 bits are judged in
    ranges as ``search_clip`` finds them, with no ``steps`` in full ones. Where inputs are rounded
    too it is the error on ``sample``, for as many tokens as there were.
    """
    total = 0.0
    for part in group.parts:
        for linear in part.linears if part.tokens else ():
            searched = steps if linear.args.bits < 8 else 0
            off = scaled_difference(linear, scale, part.gram, steps=searched, smallest=smallest)
            if linear.activations is None:
                total += output_error(off, part.gram)
                continue
            x = part.sample
            rounded = fake_quantize_activations(x / scale, linear.activations) * scale
            restored = linear.weight + off
            error = (rounded @ restored.T - x @ linear.weight.T).square().sum().item()
            total += error * part.tokens / len(x)
    return total


def clip_errors(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, blocks: Tensor, args: QuantArgs
) -> Tensor:
    """``(w - ŵ) G (w - ŵ)ᵀ`` of each group under each candidate: ``[candidates, out, groups]``.

    ``weight: [out, in]``; ``scales`` and ``zeros``: ``[candidates, out, groups]``; ``blocks:
    [groups, size, size]``.
    """
    if weight.is_cuda and not args.is_float and blocks.shape[1] in (32, 64, 128):
        from qplug.numerics.clipping_kernel import clip_errors_on_gpu

        return clip_errors_on_gpu(weight, scales, zeros, blocks, args)
    errors = torch.empty(scales.shape, device=weight.device)
    halved = blocks.bfloat16() if blocks.is_cuda else blocks  # as in numerics.output_error
    for number, scale in enumerate(scales):
        zero = None if zeros is None else zeros[number]
        restored = dequantize_with(quantize(weight, scale, zero, args), scale, zero, args)
        groups = restored.sub_(weight).view(len(weight), *blocks.shape[:2]).transpose(0, 1)
        if groups.is_cuda:
            products = torch.bmm(groups.bfloat16(), halved, out_dtype=torch.float32)
        else:
            products = torch.bmm(groups, halved)
        errors[number] = products.mul_(groups).sum(-1).T
    return errors


def unclipped_ratio(args: QuantArgs) -> float:
    """How much wider than ``minmax_scale`` a range must be so that no weight is clipped.

    Symmetric integers reach one step less far above zero than below it; ``minmax_scale`` puts the
    largest weight between the two ends.
    """
    if args.is_float or not args.symmetric:
        return 1.0
    low, high = args.code_range
    return (high - low) / (2 * high)


def diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """The blocks of ``size`` on the diagonal of ``gram: [in, in]``: ``[groups, size, size]``."""
    edges = range(0, gram.shape[0], size)
    return torch.stack([gram[edge : edge + size, edge : edge + size] for edge in edges])
