"""SmoothQuant (Xiao et al., arXiv 2211.10438)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from qplug import Algorithm, Block, Param, Scheme


@dataclass(frozen=True)
class Params:
    alpha: Annotated[float, Param("How much of an outlier goes into the weights.", 0, 1)] = 0.5
    norms_only: Annotated[bool, Param("Smooth only what a norm makes, as the paper does.")] = True


class SmoothQuant(Algorithm[Params]):
    """Move the outliers of inputs into the weights that read them."""

    name = "smoothquant"
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
        """Equation 4: ``s = max|x|^alpha / max|w|^(1 - alpha)``, channel by channel."""
        for group in block.groups:
            if not group.scalable or (self.params.norms_only and not group.after_norm):
                continue
            weight = torch.stack([linear.weight.abs().amax(0) for linear in group.linears]).amax(0)
            inputs = block.shared(group, torch.maximum(group.high, -group.low))
            weight = block.shared(group, weight)
            alpha = self.params.alpha
            scale = inputs.clamp(min=1e-5).pow(alpha) / weight.clamp(min=1e-5).pow(1 - alpha)
            block.smooth(group, scale.clamp(min=1e-5))
