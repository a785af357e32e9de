"""GPTQ that chooses the scale of a block of columns when the turn of the block comes.

The scales of NVFP4 are codes of e4m3: so few can be the best for a block that all are tried, on the
weights as earlier columns have left them. A candidate rounds the columns of the block one after the
other, each with the errors of those before it. Its errors, divided by the diagonal of the factor
and squared, sum up to what the layer loses by the block once all later columns have made up for
what they can: the very loss that GPTQ minimises (arXiv 2210.17323, equations 2 and 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qplug import QuantArgs
from qplug.numerics import code_dtype, stored_candidates
from qplug_gptq.solver import rounder, subtract


def order_of_columns(diagonal: Tensor, size: int) -> Tensor:
    """The columns, int64 ``[n, in]``, in an order that keeps groups of ``size`` together.

    Groups with large inputs come first, and in each group columns with large inputs. ``diagonal:
    [n, in]``: the diagonal of the Gram matrix. ``size`` 1 sorts columns.
    """
    groups = diagonal.unflatten(1, (-1, size))
    order = torch.argsort(groups.sum(2), dim=1, descending=True, stable=True)
    within = torch.argsort(groups, dim=2, descending=True, stable=True)
    columns = within.gather(1, order[:, :, None].expand(within.shape))
    return (columns + order[:, :, None] * size).flatten(1)


def solve_choosing(
    weight: Tensor,
    global_scale: Tensor,
    args: QuantArgs,
    factor: Tensor,
    order: Tensor,
    block_size: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Codes ``[n, out, in]`` of ``weight: [n, out, in]``, and their scales ``[n, out, groups]``.

    ``global_scale: [n, 1]``. ``factor``: from ``inverse_factor``, for
    columns in ``order: [n, in]``, in which the columns of a group follow one another.
    ``block_size``: columns between updates of the rest, at least a group. ``count``: candidates for
    each scale, at most.
    """
    total, rows, width = weight.shape
    size = args.group_size
    assert size is not None
    work = weight.mT.gather(1, order[:, :, None].expand(total, width, rows))
    codes = torch.empty(work.shape, dtype=code_dtype(args), device=work.device)
    stored = codes.view(torch.uint8) if codes.element_size() == 1 else codes
    scale = torch.empty(total, width // size, rows, device=work.device)
    round_columns = rounder(work, args, size)
    step = max(size, block_size // size * size)
    errors = torch.empty(total, step, rows, device=work.device)
    for start in range(0, width, step):
        stop = min(start + step, width)
        for first in range(start, stop, size):
            last = first + size
            part = work[:, first:last]
            candidates = torch.stack(
                [*stored_candidates(part.abs().amax(1), args, global_scale, count)], 1
            )  # [n, candidates, out]
            shape = (total, size, *candidates.shape[1:])
            trials = part[:, :, None].repeat(1, 1, candidates.shape[1], 1).flatten(2)
            scales = candidates.flatten(1)[:, None].expand(trials.shape)
            tile = factor[:, first:last, first:last]
            rounded, missed = (
                each.view(shape) for each in round_columns(trials, scales, None, tile, args)
            )
            best = missed.square().sum(1).argmin(1, keepdim=True)  # [n, 1, out]
            scale[:, first // size] = candidates.gather(1, best)[:, 0]
            best = best[:, None].expand(total, size, 1, rows)
            own = errors[:, first - start : last - start]
            own.copy_(missed.gather(2, best)[:, :, 0])
            places = order[:, first:last, None].expand(own.shape)
            chosen = rounded.gather(2, best)[:, :, 0]
            stored.scatter_(1, places, chosen.to(codes.dtype).view(stored.dtype))
            if last < stop:
                subtract(work[:, last:stop], factor[:, first:last, last:stop].mT, own)
        if stop < width:
            subtract(work[:, stop:], factor[:, start:stop, stop:].mT, errors[:, : stop - start])
    groups = order[:, ::size] // size
    in_place = torch.empty_like(scale).scatter_(1, groups[:, :, None].expand(scale.shape), scale)
    return codes.mT.contiguous(), in_place.mT.contiguous()
