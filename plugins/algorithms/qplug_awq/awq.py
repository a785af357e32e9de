"""AWQ (Lin et al., arXiv 2306.00978), with a search on Gram matrices instead of forward passes.

For scales ``s`` of a group's input, the error over all tokens is ``tr(D G Dᵀ)`` with
``D = W - Q(W diag(s)) diag(s)⁻¹`` (equation 4 of the paper), summed over the linears of the group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from qplug import Algorithm, Block, InputGroup, Linear, Param
from qplug.numerics import completed_experts, completed_gram, scaling_error, search_clip


@dataclass(frozen=True)
class Params:
    scale: Annotated[bool, Param("Search scales of inputs.", also=("trans",))] = True
    version: Annotated[
        Literal["v1", "v2"],
        Param("v1: x^r / w^(1-r); v2: x^r, of mean magnitudes.", also=("trans_version",)),
    ] = "v2"
    ratios: Annotated[int, Param("Ratios r that are tried, from 0 on.", 1)] = 20
    clip: Annotated[
        bool, Param("Search clips of weights of fewer than 8 bits.", also=("weight_clip",))
    ] = True
    clip_steps: Annotated[int, Param("Steps of the clip search.", 1)] = 20
    clip_smallest: Annotated[float, Param("The smallest range, of the full one.", 0.05, 1)] = 0.6
    clip_in_search: Annotated[
        int, Param("Steps of a clip search for each ratio; 0 judges ratios unclipped.", 0)
    ] = 5
    prior: Annotated[
        float,
        Param(
            "Tokens of the layer that complete the statistics of an expert with n tokens, in units "
            "of sqrt(width * n), for its final clips; 0 adds none.",
            0,
        ),
    ] = 2.0


class AWQ(Algorithm[Params]):
    """Scale up the columns that carry large inputs, and clip ranges, before rounding."""

    name = "awq"
    Params = Params
    needs_data = True

    @property
    def decides(self) -> frozenset[str]:
        return frozenset({"the scales of inputs"} if self.params.scale else ())

    def transform(self, block: Block) -> None:
        params = self.params
        if params.scale:
            self._scale(block)
        self._clip_all(block)

    def _scale(self, block: Block) -> None:
        """Give each group the scale of least loss.

        The scale of one group does not change the loss of another, so all candidates of all groups
        are tried first, in any order.
        """
        steps = self.params.ratios
        ratios: list[float | None] = [None, *(step / steps for step in range(steps))]
        groups = [group for group in block.groups if group.scalable]
        candidates = [(group, ratio) for group in groups for ratio in ratios]

        def loss(candidate: tuple[InputGroup, float | None]) -> float:
            group, ratio = candidate
            return self._loss(group, self._candidate(block, group, ratio))

        losses = block.spread(candidates, loss, cost=lambda candidate: _products(candidate[0]))
        for number, group in enumerate(groups):
            own = losses[number * len(ratios) : (number + 1) * len(ratios)]
            best = ratios[own.index(min(own))]
            block.smooth(group, self._candidate(block, group, best))

    def _clip_all(self, block: Block) -> None:
        params = self.params
        clipped = [
            (group, whole, linear)
            for whole in block.groups
            for group in whole.by_tokens
            for linear in group.linears
            if self._clips(linear)
        ]

        def search(
            item: tuple[InputGroup, InputGroup, Linear],
        ) -> tuple[Tensor | None, Tensor | None]:
            group, whole, linear = item
            gram = completed_gram(group, whole, params.prior)
            if not group.tokens and not gram.any():  # an expert of which nothing is known
                return None, None
            trial = replace(linear)
            search_clip(trial, gram, steps=params.clip_steps, smallest=params.clip_smallest)
            return trial.scale, trial.zero

        clips = block.spread(clipped, search, cost=lambda item: _clip_cost(item[2]))
        for (*_, linear), clip in zip(clipped, clips, strict=True):
            linear.scale, linear.zero = clip
        if clipped and params.prior:
            block.notes.extend(completed_experts(block.groups))

    def _clips(self, linear: Linear) -> bool:
        """Whether the range of ``linear`` is clipped; with 8 bits the full range is fine enough."""
        return self.params.clip and linear.args.bits < 8

    def _candidate(self, block: Block, group: InputGroup, ratio: float | None) -> Tensor:
        """The scale ``[in]`` for ``ratio``, the geometric mean of its extremes being 1.

        ``ratio`` None gives ones.
        """
        if ratio is None:  # the same as ratio 0 of v2; also tried in v1
            return torch.ones_like(group.mean_abs)
        scale = group.mean_abs.pow(ratio)
        if self.params.version == "v1":
            scale = scale / _relative_weight(group.linears).pow(1 - ratio)
        scale = scale.clamp(min=1e-4)
        return block.shared(group, scale / (scale.max() * scale.min()).sqrt())

    def _loss(self, group: InputGroup, scale: Tensor) -> float:
        steps = self.params.clip_in_search if self.params.clip else 0
        return scaling_error(group, scale, steps=steps, smallest=self.params.clip_smallest)


def _products(group: InputGroup) -> float:
    """The cost of multiplying the errors of a group's linears by the Gram matrix."""
    return len(group.gram) * sum(linear.weight.numel() for linear in group.linears)


def _clip_cost(linear: Linear) -> float:
    return linear.weight.numel() * (linear.args.group_size or linear.weight.shape[1])


def _relative_weight(linears: tuple[Linear, ...]) -> Tensor:
    """The mean over rows of ``|w| / max|w|``, the maximum taken over its group, ``[in]``."""
    parts = []
    for linear in linears:
        size = linear.args.group_size or linear.weight.shape[1]
        groups = linear.weight.abs().unflatten(1, (-1, size))
        parts.append((groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1).mean(0))
    return torch.stack(parts).mean(0).clamp(min=1e-4)
