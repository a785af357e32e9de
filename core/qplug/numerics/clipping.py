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
from qplug.numerics.losses import as_factor, multiplies_halves, output_errors
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
    if args.two_level and len(linears) > 1:  # each has a global scale of its own
        for linear, own in zip(linears, gram, strict=True):
            search_clip(linear, own, steps=steps, smallest=smallest)
        return
    blocks = searched_blocks(gram, args)
    if blocks is None:
        return
    weight = together([linear.weight for linear in linears])  # [n, out, in]
    scale, zero = _search(weight, args, global_scale_of(linears[0]), blocks, steps, smallest)
    for number, linear in enumerate(linears):
        linear.scale = scale[number]
        linear.zero = None if zero is None else zero[number]


def _search(
    weight: Tensor,
    args: QuantArgs,
    global_scale: Tensor | None,
    blocks: Tensor,
    steps: int,
    smallest: float,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points ``[n, out, groups]`` of ``weight: [n, out, in]``, in steps of rows."""
    rows = max(1, _CHUNK // weight[0, 0].numel() // len(weight))
    parts = [
        _search_rows(part, args, global_scale, blocks, steps, smallest)
        for part in weight.split(rows, dim=1)
    ]
    zeros = [zero for _, zero in parts if zero is not None]
    return torch.cat([scale for scale, _ in parts], 1), torch.cat(zeros, 1) if zeros else None


def _search_rows(
    weight: Tensor,
    args: QuantArgs,
    global_scale: Tensor | None,
    blocks: Tensor,
    steps: int,
    smallest: float,
) -> tuple[Tensor, Tensor | None]:
    low, high = weight_range(weight.flatten(0, 1), args)
    zeros: Tensor | None = None
    if has_stored_steps(args):
        peak = torch.maximum(-low, high)
        scales = torch.stack([*stored_candidates(peak, args, global_scale, steps + 1)])
    else:
        largest = unclipped_ratio(args)
        tried = [largest - step * (largest - smallest) / steps for step in range(steps + 1)]
        ratios = torch.tensor(tried, device=weight.device)[:, None, None]
        scales, zeros = range_scale(low * ratios, high * ratios, args, global_scale)
    errors = clip_errors(weight, scales, zeros, blocks, args)
    best = errors.argmin(0, keepdim=True)
    shape = (*weight.shape[:2], -1)
    scale = scales.gather(0, best).view(shape)
    return scale, None if zeros is None else zeros.gather(0, best).view(shape)


def scaled_differences(
    weight: Tensor,
    args: QuantArgs,
    scale: Tensor,
    blocks: Tensor | None,
    *,
    steps: int,
    smallest: float,
) -> Tensor:
    """``Q(W diag(s)) diag(s)⁻¹ - W`` for scales ``s`` of the inputs: ``[n, out, in]``.

    ``weight: [n, out, in]``, of linears with one grid; ``scale: [n, in]``. ``blocks``: what
    ``searched_blocks`` returns for the inputs as they are. ``Q`` rounds to nearest in the ranges
    that ``search_clip`` finds, or in full ranges if ``steps`` is 0. The result is bfloat16 if a GPU
    computes it in one kernel, else float32.
    """
    if multiplies_halves(weight) and not args.is_float and args.group_size in (32, 64, 128):
        from qplug.numerics.clipping_kernel import scaled_difference_on_gpu

        assert blocks is not None
        return scaled_difference_on_gpu(
            weight,
            scale,
            as_factor(blocks),
            args,
            steps=steps,
            largest=unclipped_ratio(args) if steps else 1.0,
            smallest=smallest,
            least=SMALLEST[args.scale_dtype],
        )
    differences = torch.empty_like(weight)
    for number, (out, plain, own) in enumerate(zip(differences, weight, scale, strict=True)):
        scaled = Linear("", plain * own, args)
        if steps and blocks is not None:
            by_group = own.view(blocks.shape[1], -1)
            apart = blocks[number] / (by_group[:, :, None] * by_group[:, None, :])
            global_scale = global_scale_of(scaled)
            found = _search(scaled.weight[None], args, global_scale, apart[None], steps, smallest)
            scaled.scale, scaled.zero = (None if each is None else each[0] for each in found)
        out.copy_(dequantize(nearest(scaled)).div_(own).sub_(plain))
    return differences


def scaling_error(group: InputGroup, scale: Tensor, *, steps: int, smallest: float) -> float:
    """The squared error of the outputs of a group's linears if its input is divided by ``scale``.

    ``scale: [in]``. The sum is over all tokens; for experts, over the tokens routed to them.
    Weights of fewer than 8 bits are rounded in the ranges of ``search_clip``, or in full ranges if
    ``steps`` is 0. If inputs are rounded too, the error on ``sample`` is scaled up to all tokens.
    """
    return float(candidate_errors(group, scale[None], steps=steps, smallest=smallest))


def candidate_errors(group: InputGroup, scales: Tensor, *, steps: int, smallest: float) -> Tensor:
    """The ``scaling_error`` of ``group`` for each of ``scales: [candidates, in]``.

    Returns float64 ``[candidates]``; a GPU is not waited for.
    """
    parts = [part for part in group.by_tokens if part.tokens]
    total = torch.zeros(len(scales), dtype=torch.float64, device=scales.device)
    for alike in side_by_side(parts):
        each = scales[:, None].expand(-1, len(alike), -1)
        total += scaling_errors(alike, each, steps=steps, smallest=smallest).sum(1)
    return total


def scaling_errors(
    groups: Sequence[InputGroup], scale: Tensor, *, steps: int, smallest: float
) -> Tensor:
    """The ``scaling_error`` of each of ``groups``, which are alike: float64 ``[n]``.

    ``scale: [n, in]``; the result of several, ``[candidates, n, in]``, is ``[candidates, n]``. The
    groups are some of those that ``side_by_side`` returned together.
    """
    if scale.ndim == 2:
        return scaling_errors(groups, scale[None], steps=steps, smallest=smallest)[0]
    gram = together([group.gram for group in groups])
    errors = torch.zeros(scale.shape[:2], dtype=torch.float64, device=gram.device)
    if not groups[0].tokens:
        return errors
    factor = as_factor(gram)
    for linears in zip(*(group.linears for group in groups), strict=True):
        args, weight = linears[0].args, together([linear.weight for linear in linears])
        blocks = searched_blocks(gram, args)
        searched = steps if args.bits < 8 else 0
        for own_errors, own in zip(errors, scale, strict=True):
            differences = scaled_differences(
                weight, args, own, blocks, steps=searched, smallest=smallest
            )
            if linears[0].activations is None:
                own_errors += output_errors(differences, factor)
                continue
            for number, (group, linear) in enumerate(zip(groups, linears, strict=True)):
                x = group.sample
                rounded = fake_quantize_activations(x / own[number], linear.activations)
                restored = linear.weight + differences[number]
                error = (rounded * own[number]) @ restored.T - x @ linear.weight.T
                own_errors[number] += error.square().sum() * (group.tokens / len(x))
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
    factor = as_factor(blocks)
    count, rows = weight.shape[:2]
    flat = weight.flatten(0, 1)
    for number, scale in enumerate(scales):
        zero = None if zeros is None else zeros[number]
        restored = dequantize_with(quantize(flat, scale, zero, args), scale, zero, args)
        groups = restored.sub_(flat).view(count, rows, *blocks.shape[1:3]).transpose(1, 2)
        groups = groups.flatten(0, 1)  # [n * groups, out, size]
        if factor.dtype == torch.bfloat16:
            products = torch.bmm(groups.bfloat16(), factor.flatten(0, 1), out_dtype=torch.float32)
        else:
            products = torch.bmm(groups, factor.flatten(0, 1))
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


def searched_blocks(gram: Tensor, args: QuantArgs) -> Tensor | None:
    """The blocks of ``gram: [n, in, in]`` by which ``search_clip`` judges ranges under ``args``.

    ``[n, groups, size, size]``; None if it judges none.
    """
    if args.strategy not in ("group", "channel"):
        return None
    return diagonal_blocks(gram, args.group_size or gram.shape[2])


def diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """The blocks of ``size`` on the diagonals of ``gram``: ``[n, groups, size, size]``.

    ``gram: [n, in, in]``; ``size`` divides ``in``.
    """
    groups = gram.shape[1] // size
    tiles = gram.unflatten(1, (groups, size)).unflatten(3, (groups, size))
    blocks: Tensor = tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
    return blocks
