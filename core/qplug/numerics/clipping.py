"""A search for the range of a weight under which the layer's output has the least error.

For the columns ``g`` of a row that share a scale, a rounded candidate ``ŵ`` and the Gram matrix
``G`` of the input, the error over all calibration tokens is ``(w - ŵ)_g G_gg (w - ŵ)_gᵀ``: only
diagonal blocks of ``G`` matter, and no pass over tokens is needed. AWQ (arXiv 2306.00978, section
3.2) clips by such a search.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qplug.api import InputGroup, Linear
from qplug.api.groups import dequantize, dequantize_with
from qplug.api.scheme import QuantArgs
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.alike import side_by_side, together
from qplug.numerics.losses import output_errors
from qplug.numerics.rounding import nearest, quantize
from qplug.numerics.scale_formats import SMALLEST
from qplug.numerics.scales import global_scale_of, range_scale, weight_range
from qplug.numerics.stored_scales import has_stored_steps, stored_candidates

#: Weights in one step of the search.
_CHUNK = 1 << 26


def search_clip(linear: Linear, gram: Tensor, *, steps: int, smallest: float) -> None:
    """Set ``linear.scale`` and ``linear.zero`` to the range of least error, for each group.

    Candidates go from a range that clips nothing to ``smallest`` times the full one, in ``steps``
    steps. Scales of NVFP4 and MXFP4 are chosen among the first ``steps + 1`` of
    ``stored_candidates``, wider and narrower ones. ``gram: [in, in]``: the sum of ``xᵀx`` of the
    linear's input. If rows share a scale (FP8 blocks and tensors) nothing is set.
    """
    search_clips([linear], gram[None], steps=steps, smallest=smallest)


def search_clips(linears: Sequence[Linear], gram: Tensor, *, steps: int, smallest: float) -> None:
    """``search_clip`` for several linears of one shape and grid; ``gram: [n, in, in]``."""
    args = linears[0].args
    if args.strategy not in ("group", "channel"):
        return
    if args.two_level and len(linears) > 1:  # each has a global scale of its own
        for linear, own in zip(linears, gram, strict=True):
            search_clip(linear, own, steps=steps, smallest=smallest)
        return
    weight = together([linear.weight for linear in linears])  # [n, out, in]
    global_scale = global_scale_of(linears[0])
    blocks = diagonal_blocks(gram, args.group_size or weight.shape[2])
    scales, zeros = [], []
    for part in weight.split(max(1, _CHUNK // weight[0, 0].numel() // len(weight)), dim=1):
        scale, zero = _search(part, args, global_scale, blocks, steps, smallest)
        scales.append(scale)
        zeros.append(zero)
    found = torch.cat(scales, 1)
    found_zeros = None if zeros[0] is None else torch.cat([z for z in zeros if z is not None], 1)
    for number, linear in enumerate(linears):
        linear.scale = found[number]
        linear.zero = None if found_zeros is None else found_zeros[number]


def _search(
    weight: Tensor,
    args: QuantArgs,
    global_scale: Tensor | None,
    blocks: Tensor,
    steps: int,
    smallest: float,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points ``[n, out, groups]`` of ``weight: [n, out, in]``."""
    low, high = weight_range(weight.flatten(0, 1), args)
    candidates: list[tuple[Tensor, Tensor | None]]
    if has_stored_steps(args):
        stored = stored_candidates(torch.maximum(-low, high), args, global_scale, steps + 1)
        candidates = [(scale, None) for scale in stored]
    else:
        largest = unclipped_ratio(args)
        ratios = [largest - step * (largest - smallest) / steps for step in range(steps + 1)]
        candidates = [
            range_scale(low * ratio, high * ratio, args, global_scale) for ratio in ratios
        ]
    scales = torch.stack([scale for scale, _ in candidates])
    zeros = None if args.symmetric else torch.stack([z for _, z in candidates if z is not None])
    errors = clip_errors(weight, scales, zeros, blocks, args)
    best = errors.argmin(0, keepdim=True)
    shape = (*weight.shape[:2], -1)
    scale = scales.gather(0, best).view(shape)
    return scale, None if zeros is None else zeros.gather(0, best).view(shape)


def scaled_differences(
    linears: Sequence[Linear], scale: Tensor, gram: Tensor, *, steps: int, smallest: float
) -> Tensor:
    """``Q(W diag(s)) diag(s)⁻¹ - W`` for scales ``s`` of the inputs: ``[n, out, in]``.

    ``linears`` have one shape and grid; ``scale: [n, in]``, ``gram: [n, in, in]``. ``Q`` rounds to
    nearest in the ranges that ``search_clip`` finds, or in full ranges if ``steps`` is 0. The
    result is bfloat16 if a GPU computes it in one kernel, else float32.
    """
    args, weight = linears[0].args, together([linear.weight for linear in linears])
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
    differences = torch.empty_like(weight)
    for out, linear, own, own_gram in zip(differences, linears, scale, gram, strict=True):
        scaled = Linear(linear.name, linear.weight * own, args)
        if steps:
            search_clip(scaled, own_gram / (own[:, None] * own), steps=steps, smallest=smallest)
        out.copy_(dequantize(nearest(scaled)).div_(own).sub_(linear.weight))
    return differences


def scaling_error(group: InputGroup, scale: Tensor, *, steps: int, smallest: float) -> float:
    """The squared error of the outputs of a group's linears if its input is divided by ``scale``.

    ``scale: [in]``. The sum is over all tokens; for experts, over the tokens routed to them.
    Weights of fewer than 8 bits are rounded in the ranges of ``search_clip``, or in full ranges if
    ``steps`` is 0. If inputs are rounded too, the error on ``sample`` is scaled up to all tokens.
    """
    parts = [part for part in group.by_tokens if part.tokens]
    total = 0.0
    for alike in side_by_side(parts):
        scales = scale.expand(len(alike), -1)
        total += float(scaling_errors(alike, scales, steps=steps, smallest=smallest).sum())
    return total


def scaling_errors(
    groups: Sequence[InputGroup], scale: Tensor, *, steps: int, smallest: float
) -> Tensor:
    """The ``scaling_error`` of each of ``groups``, which are alike: float64 ``[n]``.

    ``scale: [n, in]``. The groups are some of those that ``side_by_side`` returned together.
    """
    gram = together([group.gram for group in groups])
    errors = torch.zeros(len(groups), dtype=torch.float64, device=gram.device)
    if not groups[0].tokens:
        return errors
    for linears in zip(*(group.linears for group in groups), strict=True):
        searched = steps if linears[0].args.bits < 8 else 0
        differences = scaled_differences(linears, scale, gram, steps=searched, smallest=smallest)
        if linears[0].activations is None:
            errors += output_errors(differences, gram)
            continue
        for number, (group, linear) in enumerate(zip(groups, linears, strict=True)):
            x, own = group.sample, scale[number]
            rounded = fake_quantize_activations(x / own, linear.activations) * own
            restored = linear.weight + differences[number]
            error = (rounded @ restored.T - x @ linear.weight.T).square().sum()
            errors[number] += error * (group.tokens / len(x))
    return errors


def clip_errors(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, blocks: Tensor, args: QuantArgs
) -> Tensor:
    """``(w - ŵ) G (w - ŵ)ᵀ`` of each group under each candidate, ``[candidates, n * out, groups]``.

    ``weight: [n, out, in]``. ``scales``, ``zeros``: ``[candidates, n * out, groups]``. ``blocks:
    [n, groups, size, size]``, from ``diagonal_blocks``.
    """
    if weight.is_cuda and not args.is_float and blocks.shape[2] in (32, 64, 128):
        from qplug.numerics.clipping_kernel import clip_errors_on_gpu

        return clip_errors_on_gpu(weight, scales, zeros, blocks, args)
    errors = torch.empty(scales.shape, device=weight.device)
    halved = blocks.bfloat16() if blocks.is_cuda else blocks  # as in output_error
    count, rows = weight.shape[:2]
    flat = weight.flatten(0, 1)
    for number, scale in enumerate(scales):
        zero = None if zeros is None else zeros[number]
        restored = dequantize_with(quantize(flat, scale, zero, args), scale, zero, args)
        groups = restored.sub_(flat).view(count, rows, *blocks.shape[1:3]).transpose(1, 2)
        groups = groups.flatten(0, 1)  # [n * groups, out, size]
        if groups.is_cuda:
            products = torch.bmm(groups.bfloat16(), halved.flatten(0, 1), out_dtype=torch.float32)
        else:
            products = torch.bmm(groups, halved.flatten(0, 1))
        found = products.mul_(groups).sum(-1).view(count, -1, rows)  # [n, groups, out]
        errors[number] = found.transpose(1, 2).flatten(0, 1)
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
    """The blocks of ``size`` on the diagonals of ``gram``: ``[n, groups, size, size]``.

    ``gram: [n, in, in]``; ``size`` divides ``in``.
    """
    groups = gram.shape[1] // size
    tiles = gram.unflatten(1, (groups, size)).unflatten(3, (groups, size))
    blocks: Tensor = tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
    return blocks
