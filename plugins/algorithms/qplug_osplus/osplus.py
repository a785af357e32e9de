"""Outlier Suppression+ (Wei et al., arXiv 2304.09145)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from qplug import Algorithm, Block, InputGroup, Param, Scheme
from qplug.numerics import dequantize, fake_quantize_activations, round_to_nearest

#: Thresholds that are tried in one run, for which the target is computed once.
_RUN = 10


@dataclass(frozen=True)
class Params:
    shift: Annotated[
        bool, Param("Centre channels, where biases can take it.", also=("use_shift",))
    ] = True
    steps: Annotated[int, Param("Thresholds that are tried.", 2)] = 100
    norms_only: Annotated[bool, Param("Scale only what a norm makes, as the paper does.")] = True


class OSPlus(Algorithm[Params]):
    """Shift and scale inputs until their outliers are gone."""

    name = "osplus"
    Params = Params
    needs_data = True

    @property
    def decides(self) -> frozenset[str]:
        return frozenset({"the scales of inputs"})

    def refuses(self, schemes: Sequence[Scheme]) -> str | None:
        if any(scheme.activations is not None for scheme in schemes):
            return None
        return (
            f"makes inputs easy to round, but {schemes[0].name} does not round them; "
            "use awq for such schemes"
        )

    def transform(self, block: Block) -> None:
        groups = [
            group
            for group in block.groups
            if group.scalable and (group.after_norm or not self.params.norms_only)
        ]
        for group in groups:
            if self.params.shift and group.shiftable:
                block.shift(group, (group.high + group.low) / 2)  # equation 4
        self._smooth(block, groups)

    def _smooth(self, block: Block, groups: list[InputGroup]) -> None:
        """Choose the threshold ``t`` whose scale ``max(1, max|x| / t)`` has least error (eq. 8).

        The scale of one group does not change the error of another, so all thresholds of all groups
        are tried first, in any order.
        """
        steps = range(self.params.steps)
        runs = [steps[start : start + _RUN] for start in range(0, len(steps), _RUN)]
        parts = [(group, run) for group in groups for run in runs]

        def errors(part: tuple[InputGroup, range]) -> list[float]:
            group, run = part
            losses = [0.0] * len(run)
            for same in group.by_tokens:
                if same.tokens:
                    target = [same.sample @ linear.weight.T for linear in same.linears]
                    for number, step in enumerate(run):
                        scale = self._candidate(block, group, step)
                        losses[number] += _loss(same, scale, target)
            return losses

        losses_of_runs = block.spread(
            parts, errors, cost=lambda part: _weights(part[0]) * len(part[1])
        )
        for number, group in enumerate(groups):
            own = losses_of_runs[number * len(runs) : (number + 1) * len(runs)]
            losses = [loss for run in own for loss in run]
            block.smooth(group, self._candidate(block, group, losses.index(min(losses))))

    def _candidate(self, block: Block, group: InputGroup, step: int) -> Tensor:
        """The scale ``[in]`` of a threshold from the greatest peak (step 0) to the median peak."""
        peaks = torch.maximum(group.high, -group.low)
        top, bottom = float(peaks.max()), float(peaks.median())
        if not top:  # inputs that are all zero are not scaled
            return torch.ones_like(peaks)
        threshold = top * (bottom / top) ** (step / (self.params.steps - 1)) if bottom else top
        return block.shared(group, (peaks / threshold).clamp(min=1))


def _weights(group: InputGroup) -> float:
    return sum(linear.weight.numel() for linear in group.linears)


def _loss(group: InputGroup, scale: Tensor, target: list[Tensor]) -> float:
    """The squared error over all tokens, estimated on the sample.

    ``target``: the float outputs of the linears on the sample.
    """
    total = 0.0
    for linear, output in zip(group.linears, target, strict=True):
        inputs = group.sample / scale
        if linear.activations is not None:
            inputs = fake_quantize_activations(inputs, linear.activations)
        weight = dequantize(round_to_nearest(linear.weight * scale, linear.args))
        total += (inputs @ weight.T - output).square().sum().item()
    return total * group.tokens / len(group.sample)
