"""A search for the range of a weight under which the layer's output has the least error.

For the columns ``g`` of a row that share a scale, a rounded candidate ``ŵ`` and the Gram matrix
``G`` of the input, the error over all calibration tokens is ``(w - ŵ)_g G_gg (w - ŵ)_gᵀ``: only
diagonal blocks of ``G`` matter, and no pass over tokens is needed. AWQ (arXiv 2306.00978, section
3.2) clips by such a search.
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

#: Weights in one step of the search.
_CHUNK = 1 << 26


def search_clip(linear: Linear, gram: Tensor, *, steps: int, smallest: float) -> None:
    """Set ``linear.scale`` and ``linear.zero`` to the range of least error, for each group.

    Candidates go from a range that clips nothing to ``smallest`` times the full one, in ``steps``
    steps. ``gram: [in, in]``: the sum of ``xᵀx`` of the linear's input. If rows share a scale (FP8
    blocks and tensors) nothing is set.
    """
    if linear.args.strategy not in ("group", "channel"):
        return
    rows = max(1, _CHUNK // linear.weight.shape[1])
    global_scale = global_scale_of(linear)
    scales, zeros = [], []
    for part in linear.weight.split(rows):
        trial = Linear(linear.name, part, linear.args, global_scale=global_scale)
        scale, zero = _search(trial, gram, steps, smallest)
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

    ``Q`` rounds to nearest in the ranges that ``search_clip`` finds, or in full ranges if ``steps``
    is 0. The result is bfloat16 if a GPU computes it in one kernel, else float32.
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
    """The squared error of the outputs of a group's linears if its input is divided by ``scale``.

    ``scale: [in]``. The sum is over all tokens; for experts, over the tokens routed to them.
    Weights of fewer than 8 bits are rounded in the ranges of ``search_clip``, or in full ranges if
    ``steps`` is 0. If inputs are rounded too, the error on ``sample`` is scaled up to all tokens.
    """
    total = 0.0
    for part in group.by_tokens:
        for linear in part.linears if part.tokens else ():
            searched = steps if linear.args.bits < 8 else 0
            difference = scaled_difference(
                linear, scale, part.gram, steps=searched, smallest=smallest
            )
            if linear.activations is None:
                total += output_error(difference, part.gram)
                continue
            x = part.sample
            rounded = fake_quantize_activations(x / scale, linear.activations) * scale
            restored = linear.weight + difference
            error = (rounded @ restored.T - x @ linear.weight.T).square().sum().item()
            total += error * part.tokens / len(x)
    return total


def clip_errors(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, blocks: Tensor, args: QuantArgs
) -> Tensor:
    """``(w - ŵ) G (w - ŵ)ᵀ`` of each group under each candidate, ``[candidates, out, groups]``.

    ``weight: [out, in]``. ``scales``, ``zeros``: ``[candidates, out, groups]``. ``blocks: [groups,
    size, size]``, from ``diagonal_blocks``.
    """
    if weight.is_cuda and not args.is_float and blocks.shape[1] in (32, 64, 128):
        from qplug.numerics.clipping_kernel import clip_errors_on_gpu

        return clip_errors_on_gpu(weight, scales, zeros, blocks, args)
    errors = torch.empty(scales.shape, device=weight.device)
    halved = blocks.bfloat16() if blocks.is_cuda else blocks  # as in output_error
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
    """The factor by which a range of ``minmax_scale`` must be wider so that no weight is clipped.

    Symmetric integers reach one step further below zero than above it; ``minmax_scale`` puts the
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
