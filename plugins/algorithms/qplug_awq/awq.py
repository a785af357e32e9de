"""AWQ (Lin et al., arXiv 2306.00978), with a search on Gram matrices instead of forward passes.

For scales ``s`` of a group's input, the error over all tokens is ``tr(D G Dᵀ)`` with
``D = W - Q(W diag(s)) diag(s)⁻¹`` (equation 4 of the paper), summed over the linears of the group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor

from qplug import Algorithm, Block, InputGroup, Linear, Param
from qplug.numerics import (
    candidate_errors,
    completed_experts,
    completed_gram,
    parts_side_by_side,
    scaling_errors,
    search_clips,
    side_by_side,
    together,
)


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
    clip_steps: Annotated[
        int, Param("Steps of the clip search; NVFP4 has 8 at most, MXFP4 2.", 1)
    ] = 20
    clip_smallest: Annotated[
        float, Param("The smallest range, of the full one; not for NVFP4 and MXFP4.", 0.05, 1)
    ] = 0.6
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
    effort = "searches"

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
        steps, count = self.params.ratios, block.processes
        ratios: list[float | None] = [None, *(step / steps for step in range(steps))]
        cuts = [number * len(ratios) // count for number in range(count + 1)]
        shares = [ratios[start:end] for start, end in pairwise(cuts)]
        units = side_by_side([group for group in block.groups if group.scalable])
        weights = {id(unit): self._relative_weights(unit) for unit in units}

        def candidates(unit: list[InputGroup], ratio: float | None) -> Tensor:
            return self._candidates(block, unit, ratio, weights[id(unit)])

        def losses(trial: tuple[list[InputGroup], list[float | None]]) -> Tensor:
            unit, share = trial
            return self._losses(unit, torch.stack([candidates(unit, ratio) for ratio in share]))

        trials = [(unit, share) for unit in units for share in shares if share]
        costs = block.spread(trials, losses, cost=lambda trial: _products(*trial))
        tried = len(trials) // max(1, len(units))
        for number, unit in enumerate(units):
            own = torch.cat(costs[number * tried : (number + 1) * tried]).T.tolist()
            best = [column.index(min(column)) for column in own]
            for place in sorted({*best}):
                scales = candidates(unit, ratios[place])
                for group, scale, chosen in zip(unit, scales, best, strict=True):
                    if chosen == place:
                        block.smooth(group, scale)

    def _clip_all(self, block: Block) -> None:
        params = self.params
        clipped = [
            (alike, whole, [group.linears[place] for group in alike])
            for alike, whole in parts_side_by_side(block.groups, block.processes)
            for place, linear in enumerate(alike[0].linears)
            if self._clips(linear)
        ]

        def search(
            item: tuple[list[InputGroup], InputGroup, list[Linear]],
        ) -> list[tuple[Tensor | None, Tensor | None]]:
            groups, whole, linears = item
            gram = completed_gram(groups, whole, params.prior)
            if not groups[0].tokens and not gram.any():  # experts of which nothing is known
                return [(None, None)] * len(linears)
            trials = [replace(linear) for linear in linears]
            search_clips(trials, gram, steps=params.clip_steps, smallest=params.clip_smallest)
            return [(trial.scale, trial.zero) for trial in trials]

        clips = block.spread(clipped, search, cost=lambda item: _clip_cost(item[2]))
        for (*_, linears), found in zip(clipped, clips, strict=True):
            for linear, (scale, zero) in zip(linears, found, strict=True):
                linear.scale, linear.zero = scale, zero
        if clipped and params.prior:
            block.notes.extend(completed_experts(block.groups))

    def _clips(self, linear: Linear) -> bool:
        """Whether the range of ``linear`` is clipped; with 8 bits the full range is fine enough."""
        return self.params.clip and linear.args.bits < 8

    def _candidates(
        self, block: Block, groups: list[InputGroup], ratio: float | None, weights: Tensor | None
    ) -> Tensor:
        """The scales ``[n, in]`` of ``groups`` for ``ratio``; each has 1 between its extremes.

        ``ratio`` None gives ones. ``weights: [n, in]``: the relative weights, if v1 needs them.
        """
        magnitudes = together([group.mean_abs for group in groups])
        if ratio is None:  # the same as ratio 0 of v2; also tried in v1
            return torch.ones_like(magnitudes)
        scale = magnitudes.pow(ratio)
        if weights is not None:
            scale = scale / weights.pow(1 - ratio)
        scale = scale.clamp(min=1e-4)
        scale = scale / (scale.amax(1, keepdim=True) * scale.amin(1, keepdim=True)).sqrt()
        return torch.stack(
            [block.shared(group, own) for group, own in zip(groups, scale, strict=True)]
        )

    def _relative_weights(self, groups: list[InputGroup]) -> Tensor | None:
        if self.params.version == "v2":
            return None
        return torch.stack([_relative_weight(group.linears) for group in groups])

    def _losses(self, groups: list[InputGroup], scales: Tensor) -> Tensor:
        """The losses of ``groups`` under ``scales: [ratios, n, in]``: float64 ``[ratios, n]``."""
        steps = self.params.clip_in_search if self.params.clip else 0
        smallest = self.params.clip_smallest
        if not groups[0].by_expert:
            return scaling_errors(groups, scales, steps=steps, smallest=smallest)
        of_groups = zip(groups, scales.unbind(1), strict=True)
        return torch.stack(
            [candidate_errors(*one, steps=steps, smallest=smallest) for one in of_groups], 1
        )


def _products(groups: list[InputGroup], ratios: list[float | None]) -> float:
    """The cost of multiplying the errors of all linears by the Gram matrix, for each ratio."""
    weights = sum(one.weight.numel() * group.width for group in groups for one in group.linears)
    return len(ratios) * weights


def _clip_cost(linears: list[Linear]) -> float:
    return sum(
        linear.weight.numel() * (linear.args.group_size or linear.weight.shape[1])
        for linear in linears
    )


def _relative_weight(linears: tuple[Linear, ...]) -> Tensor:
    """The mean over rows of ``|w| / max|w|``, the maximum taken over its group, ``[in]``."""
    parts = []
    for linear in linears:
        size = linear.args.group_size or linear.weight.shape[1]
        groups = linear.weight.abs().unflatten(1, (-1, size))
        parts.append((groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1).mean(0))
    return torch.stack(parts).mean(0).clamp(min=1e-4)
