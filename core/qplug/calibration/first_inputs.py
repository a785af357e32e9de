"""What enters the first decoder block, and the arguments with which a model calls each block.

All that a model computes before its first block (embeddings, masks, rotary tables) runs once, with
a recorder in the place of every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qplug.api.tensors import Checkpoint
from qplug.calibration.block_modules import BlockModules
from qplug.calibration.hidden_states import HiddenStates
from qplug.calibration.samples import Samples
from qplug.checkpoint.names import module_of
from qplug.model.block_proxy import BlockProxy, refuse_positional
from qplug.model.parameters import empty_parameters, fill_parameters, refuse_infinite


@dataclass(frozen=True, eq=False)
class FirstInputs:
    """``hidden`` states that enter the first block, and the ``calls`` of each block, by batch.

    A call is the keyword arguments of a block: masks, positions, rotary tables.
    """

    hidden: HiddenStates
    calls: dict[str, list[dict[str, Any]]]


@torch.no_grad()
def catch_first_inputs(
    blocks: BlockModules, source: Checkpoint, batches: Sequence[Samples]
) -> FirstInputs:
    """Run the part of the model before its blocks on ``batches``.

    Raises QplugError if a parameter outside of the blocks is not finite, or if blocks are called in
    a way that cannot be repeated.
    """
    model, device, names = blocks.model, blocks.device, [*blocks.modules]
    computed = {id(parameter) for parameter in model.base_model.parameters()}
    outer = [name for name in blocks.outer if id(model.get_parameter(name)) in computed]
    stored = {
        name: source.read(blocks.outer[name]).to(device)
        for name in outer
        if blocks.outer[name] in source.tensors
    }
    refuse_infinite({blocks.outer[name]: value for name, value in stored.items()})
    fill_parameters(model, blocks.computable(stored))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    recorders = {name: _Recorder(block) for name, block in blocks.modules.items()}
    parent = model.get_submodule(module_of(blocks.in_memory[0]))
    assert isinstance(parent, nn.ModuleList)
    hidden = HiddenStates(device)
    for index, recorder in enumerate(recorders.values()):
        parent[index] = recorder
    try:
        for batch in batches:
            model.base_model(**batch.inputs(device, blocks.dtype), use_cache=False)
            hidden.append(recorders[names[0]].hidden)
    finally:
        for index, block in enumerate(blocks.modules.values()):
            parent[index] = block
        empty_parameters(model, outer)
    return FirstInputs(hidden, {name: recorder.calls for name, recorder in recorders.items()})


class _Recorder(BlockProxy):
    """Records the calls of a block, and returns the hidden states unchanged."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.calls: list[dict[str, Any]] = []
        self.hidden = torch.empty(0)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        refuse_positional(args)
        self.hidden = hidden_states
        self.calls.append(kwargs)
        return hidden_states
