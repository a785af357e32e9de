"""Outlier Suppression+ (Wei et al., arXiv 2304.09145)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from qplug import Algorithm, Block, InputGroup, Param
from qplug.numerics import dequantize, fake_quantize_activations, round_to_nearest


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

    def transform(self, block: Block) -> None:
        for group in block.groups:
            if not group.scalable or (self.params.norms_only and not group.after_norm):
                continue
            if self.params.shift and group.shiftable:
                block.shift(group, (group.high + group.low) / 2)  # equation 4
            block.smooth(group, self._best_scale(block, group))

    def _best_scale(self, block: Block, group: InputGroup) -> Tensor:
        """Of thresholds ``t``, the scale ``max(1, max|x| / t)`` of least error (equation 8)."""
        peaks = torch.maximum(group.high, -group.low)
        target = [group.sample @ linear.weight.T for linear in group.linears]
        best, least = torch.ones_like(peaks), torch.inf
        top = float(peaks.max())
        bottom = float(peaks.median())
        for step in range(self.params.steps if top else 0):  # inputs that are all zero stay
            threshold = top * (bottom / top) ** (step / (self.params.steps - 1)) if bottom else top
            scale = block.shared(group, (peaks / threshold).clamp(min=1))
            loss = _loss(group, scale, target)
            if loss < least:
                best, least = scale, loss
        return best


def _loss(group: InputGroup, scale: Tensor, target: list[Tensor]) -> float:
    total = 0.0
    for linear, wanted in zip(group.linears, target, strict=True):
        inputs = group.sample / scale
        if linear.activations is not None:
            inputs = fake_quantize_activations(inputs, linear.activations)
        weight = dequantize(round_to_nearest(linear.weight * scale, linear.args))
        total += (inputs @ weight.T - wanted).square().sum().item()
    return total
