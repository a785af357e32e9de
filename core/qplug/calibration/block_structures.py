"""The input groups of blocks, found once for all blocks that are alike."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qplug.model.block_call import BlockCall, hidden_states
from qplug.model.experts import alike_in
from qplug.model.input_groups import GroupPaths, find_groups
from qplug.model.parameters import empty_parameters, set_parameter

#: Tokens on which the groups of a block are found.
PROBE = 16


class BlockStructures:
    """Finds the input groups of blocks, and keeps them by the shapes and classes of a block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found: dict[tuple[Any, ...], tuple[GroupPaths, ...]] = {}

    def of(
        self,
        module: nn.Module,
        weights: Mapping[str, Tensor],
        call: BlockCall,
    ) -> tuple[GroupPaths, ...]:
        """The input groups of the block ``module``, whose parameters are shaped as ``weights``.

        ``call``: the arguments of the block for ``PROBE`` tokens of one sample. Groups are found in
        float32 on random weights and hidden states. Not on the real weights: where they are near
        zero a wrong candidate passes, and a resumed run could decide differently.
        """
        classes = tuple(sorted({str(type(part)) for part in module.modules()}))
        key = (*classes, *((local, tuple(weight.shape)) for local, weight in weights.items()))
        if key not in self._found:
            generator = torch.Generator(self._device).manual_seed(0)
            draw = partial(torch.rand, generator=generator, device=self._device)
            # All experts share one expert's memory: there is room for one in float32.
            first = {name: names[0] for names in alike_in(module) for name in names}
            drawn: dict[str, Tensor] = {}
            for local, weight in weights.items():
                if first.get(local, local) in drawn:
                    set_parameter(module, local, drawn[first[local]])
                    continue
                if not weight.is_floating_point():  # a table of numbers, such as of tokens' experts
                    set_parameter(module, local, weight.to(self._device))
                    continue
                values = draw(weight.shape)  # norms stay away from zero, matrices keep variance
                if weight.ndim < 2:
                    values += 0.5
                else:
                    values = (values - 0.5) * (12 / weight.shape[-1]) ** 0.5
                set_parameter(module, local, values)
                drawn[first.get(local, local)] = values
            probe = call.in_float32().with_hidden(draw(call.hidden.shape) - 0.5)
            self._found[key] = find_groups(
                module, lambda: hidden_states(module(*probe.args, **probe.kwargs))
            )
            empty_parameters(module, weights)
        return self._found[key]
