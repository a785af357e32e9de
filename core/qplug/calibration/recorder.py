"""Records how a model calls its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qplug.model.stand_in import StandIn, refuse_positional


def shortened(call: Mapping[str, Any], length: int, dtype: torch.dtype) -> dict[str, Any]:
    """A block's arguments for the first ``length`` tokens of the first sample."""
    return {name: _shorten(value, length, dtype) for name, value in call.items()}


def _shorten(value: Any, length: int, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):  # cos and sin: [samples, tokens, head size]
        return tuple(part[:1, :length].to(dtype) for part in value)
    if isinstance(value, Tensor) and value.ndim == 4:  # a mask: [samples, heads, tokens, tokens]
        return value[:1, :, :length, :length]
    if isinstance(value, Tensor) and value.ndim == 2:  # positions: [samples, tokens]
        return value[:1, :length]
    return value


class Recorder(StandIn):
    """Stands for a block: notes how it is called, and lets the hidden states through."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.calls: list[dict[str, Any]] = []
        self.hidden = torch.empty(0)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        refuse_positional(args)
        self.hidden = hidden_states
        self.calls.append(kwargs)
        return hidden_states
