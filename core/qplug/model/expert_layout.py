"""How the linears of experts lie in the stacked parameters of a fused module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qplug.checkpoint.stacked import Cut


@dataclass(frozen=True)
class Part:
    """A linear of every expert: ``cut`` from the parameter ``fused`` of the module."""

    linear: str
    fused: str
    cut: Cut


@dataclass(frozen=True)
class Layout:
    """The linears of the ``count`` experts of one layer.

    ``readers`` read the tokens, in the order of their rows; ``last`` makes the output. ``gathers``:
    whether the module is called with the tokens of the layer, and with the experts of each token
    and their shares; else it is given a copy of all tokens for each expert. ``returns_others``:
    whether tokens that are routed past the last expert come out as they are.
    """

    count: int
    readers: tuple[Part, ...]
    last: Part
    gathers: bool = True
    returns_others: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """All linears of an expert."""
        return (*self.readers, self.last)

    def inner(self, fused: nn.Module, outputs: list[Tensor]) -> Tensor:
        """What the last linear reads, made of the ``outputs`` of ``readers`` as ``fused`` does."""
        if len(outputs) == 1:
            module: Any = fused
            activated: Tensor = module.act_fn(outputs[0])
            return activated
        if self.readers[0].cut.interleaved:
            both = torch.stack(outputs, -1).flatten(-2)
        else:
            both = torch.cat(outputs, -1)
        return _gated(fused, both)


def _gated(fused: nn.Module, both: Tensor) -> Tensor:
    module: Any = fused
    if hasattr(module, "_apply_gate"):
        inner: Tensor = module._apply_gate(both)
        return inner
    gate, up = both.chunk(2, -1)
    activated: Tensor = module.act_fn(gate)
    return activated * up
