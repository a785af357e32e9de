"""The input groups of blocks, found once for all blocks that are alike."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qplug.model.input_groups import GroupPaths, find_groups
from qplug.model.parameters import empty_parameters, first_tensor, set_parameter

#: Tokens on which the groups of a block are found.
_PROBE = 16


class BlockStructures:
    """Finds the input groups of blocks, and keeps them by the shapes and classes of a block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found: dict[tuple[Any, ...], tuple[GroupPaths, ...]] = {}

    def of(
        self,
        module: nn.Module,
        weights: Mapping[str, Tensor],
        call: Mapping[str, Any],
        shape: tuple[int, int],
    ) -> tuple[GroupPaths, ...]:
        """The input groups of the block ``module``, whose parameters are shaped as ``weights``.

        ``call``: the block's other arguments in a batch; ``shape``: tokens and width of its input.
        Groups are found in float32 on random weights and tokens. Not on the real weights: where
        they are near zero a wrong candidate passes, and a resumed run could decide differently.
        """
        classes = tuple(sorted({str(type(part)) for part in module.modules()}))
        key = (*classes, *((local, tuple(weight.shape)) for local, weight in weights.items()))
        if key not in self._found:
            generator = torch.Generator(self._device).manual_seed(0)
            draw = partial(torch.rand, generator=generator, device=self._device)
            for local, weight in weights.items():
                values = draw(weight.shape)  # norms stay away from zero, matrices keep variance
                if weight.ndim < 2:
                    values += 0.5
                else:
                    values = (values - 0.5) * (12 / weight.shape[-1]) ** 0.5
                set_parameter(module, local, values)
            length, width = shape
            probe = draw(1, min(_PROBE, length), width) - 0.5
            short = _shortened(call, _PROBE)
            self._found[key] = find_groups(module, lambda: first_tensor(module(probe, **short)))
            empty_parameters(module, weights)
        return self._found[key]


def _shortened(call: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The arguments of a block for the first ``length`` tokens of the first sample, in float32."""
    return {name: _shorten(value, length) for name, value in call.items()}


def _shorten(value: Any, length: int) -> Any:
    if isinstance(value, tuple):  # cos and sin: [samples, tokens, head size]
        return tuple(part[:1, :length].to(torch.float32) for part in value)
    if isinstance(value, Tensor) and value.ndim == 4:  # a mask: [samples, heads, tokens, tokens]
        return value[:1, :, :length, :length]
    if isinstance(value, Tensor) and value.ndim == 2:  # positions: [samples, tokens]
        return value[:1, :length]
    return value
