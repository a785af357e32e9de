"""The part of a model outside of its decoder blocks, which makes what enters them."""

from __future__ import annotations

from functools import partial

from torch import nn

from qplug.api.tensors import Checkpoint
from qplug.calibration.block_modules import BlockModules
from qplug.calibration.samples import Samples
from qplug.calibration.stopped_pass import StoppedPass, StoppingBlocks
from qplug.checkpoint.names import module_of, split_name
from qplug.model.parameters import empty_parameters, fill_parameters, refuse_infinite


class Entrance:
    """Starts passes of the model of ``blocks`` that stop at each of its blocks.

    The parameters of the decoder outside of the blocks are read at once. The parameters of other
    parts, such as vision towers, are read when a pass first computes with them.
    """

    def __init__(self, blocks: BlockModules, source: Checkpoint) -> None:
        """Raises QplugError if a parameter of the decoder is not finite."""
        self._blocks, self._source = blocks, source
        model, device = blocks.model, blocks.device
        self._outer: dict[str, list[str]] = {}  # names in memory, by module
        for name, on_disk in blocks.outer.items():
            if on_disk in source.tensors:
                self._outer.setdefault(module_of(name), []).append(name)
        decoder = model.get_submodule(module_of(module_of(blocks.in_memory[0])))
        inside = {id(module) for module in decoder.modules()}
        owned = [path for path in self._outer if id(model.get_submodule(path)) in inside]
        self._fill([name for path in owned for name in self._outer[path]])
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        for path in self._outer:
            model.get_submodule(path).register_forward_pre_hook(partial(self._fill_empty, path))
        self._stopping = StoppingBlocks(model, blocks.modules)

    def begin(self, batch: Samples) -> StoppedPass:
        """A pass of the model on ``batch``."""
        blocks = self._blocks
        inputs = {n: v.to(blocks.device) for n, v in batch.inputs(blocks.dtype).items()}
        return self._stopping.begin(partial(blocks.model, **inputs, use_cache=False))

    def free_embeddings(self) -> None:
        """Frees the memory of embeddings; they are read again if a pass computes with them."""
        for path, names in self._outer.items():
            if isinstance(self._blocks.model.get_submodule(path), nn.Embedding):
                empty_parameters(self._blocks.model, names)

    def _fill(self, names: list[str]) -> None:
        on_disk = {name: self._blocks.outer[name] for name in names}
        stored = {
            name: self._source.read(stored).to(self._blocks.device)
            for name, stored in on_disk.items()
        }
        refuse_infinite({on_disk[name]: value for name, value in stored.items()})
        fill_parameters(self._blocks.model, self._blocks.computable(stored))

    def _fill_empty(self, path: str, module: nn.Module, inputs: object) -> None:
        parameters = module._parameters
        empty = [
            name
            for name in self._outer[path]
            if (value := parameters.get(split_name(name)[1])) is not None and value.is_meta
        ]
        if empty:
            self._fill(empty)
