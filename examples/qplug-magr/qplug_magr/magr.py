"""MagR (Zhang et al., arXiv 2406.00800), on the Gram matrices of input groups.

The inputs of a layer are nearly of low rank, so many weights give nearly the same outputs. Among
these, the weight with the smallest ranges has the smallest rounding errors. So for each row ``w``
of the float weight, with groups ``g`` of columns that share a scale, MagR minimises::

    1/2 (v - w) G (v - w)ᵀ + alpha * sum_g max|v_g|

with ``G = xᵀx`` scaled to a largest eigenvalue of 1 (equation 5 of the paper, where a row is one
group), by proximal gradient steps of length 1 (algorithm 1). The proximal operator of ``max|.|``
subtracts the projection onto an l1 ball.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from qplug import Algorithm, Block, InputGroup, Param


@dataclass(frozen=True)
class Params:
    alpha: Annotated[float, Param("The price of a range; 0.001 for 2 or 3 bits.", 0)] = 1e-4
    steps: Annotated[int, Param("Proximal gradient steps.", 1)] = 150


class MagR(Algorithm[Params]):
    """Make ranges of weights as small as the data allow, before they are rounded."""

    name = "magr"
    Params = Params
    needs_data = True

    def transform(self, block: Block) -> None:
        for group in block.groups:
            gram = _scaled(group)
            if gram is None:
                continue
            for linear in group.linears:
                width = linear.args.group_size or linear.weight.shape[1]
                smaller = shrink(linear.weight, gram, self.params.alpha, self.params.steps, width)
                block.replace(linear, smaller)


def _scaled(group: InputGroup) -> Tensor | None:
    """The Gram matrix divided by its largest eigenvalue; None if it is zero."""
    largest = torch.linalg.eigvalsh(group.gram.double())[-1]
    return group.gram / largest.float() if largest > 0 else None


def shrink(weight: Tensor, gram: Tensor, alpha: float, steps: int, width: int) -> Tensor:
    """The weight ``[out, in]`` of least cost near ``weight``.

    ``gram: [in, in]``, with no eigenvalue above 1. ``width``: columns of a group.
    """
    smaller = weight.clone()
    for _ in range(steps):
        smaller = smaller - (smaller - weight) @ gram
        smaller = less_range(smaller.unflatten(1, (-1, width)), alpha).flatten(1)
    return smaller


def less_range(values: Tensor, price: float) -> Tensor:
    """The proximal operator of ``price * max|v|`` along the last axis.

    By Moreau's identity it is ``v`` less its projection onto the l1 ball of radius ``price``, which
    is found by sorting (Duchi et al., ICML 2008).
    """
    magnitudes = values.abs()
    ordered = magnitudes.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - price
    counts = torch.arange(1, values.shape[-1] + 1, device=values.device)
    last = (ordered * counts > excess).sum(-1, keepdim=True).clamp(min=1)
    limit = (excess.gather(-1, last - 1) / last).clamp(min=0)
    return torch.minimum(magnitudes, limit) * values.sign()
