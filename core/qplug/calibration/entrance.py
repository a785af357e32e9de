"""The part of a model outside of its decoder blocks, which makes what enters them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from qplug.api.tensors import Checkpoint
from qplug.calibration.block_modules import BlockModules
from qplug.calibration.samples import Samples
from qplug.calibration.stopped_pass import StoppedPass, StoppingBlocks
from qplug.checkpoint.names import is_within, module_of
from qplug.model.model_part import part_for
from qplug.model.parameters import compute_on, fill_parameters, refuse_infinite


class Entrance:
    """Starts passes of the model of ``blocks`` that stop at each of its blocks.

    The parameters of the decoder outside of the blocks are read at once. The parameters of other
    parts, such as vision towers, are read when a pass first computes with these parts, so a run on
    text reads none of them.
    """

    def __init__(self, blocks: BlockModules, source: Checkpoint) -> None:
        """Raises QplugError if a parameter of the decoder is not finite."""
        self._blocks, self._source = blocks, source
        model, device = blocks.model, blocks.device
        self._decoder = path = module_of(module_of(blocks.in_memory[0]))
        around = {""}  # the decoder and all modules that contain it
        while path:
            around.add(path)
            path = module_of(path)
        at_once, self._below = [], dict[str, list[str]]()  # names in memory, by module
        for name, on_disk in blocks.outer.items():
            if not all(each in source.tensors for each in on_disk):
                continue
            path = module_of(name)
            if path in around or self._in_decoder(name):
                at_once.append(name)
            while path not in around:
                self._below.setdefault(path, []).append(name)
                path = module_of(path)
        self._later = {name for names in self._below.values() for name in names}
        self._empty(sorted(self._later))
        self._fill(at_once)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        compute_on(model, device)
        # Each hook refers to this object, which refers to the model: a cycle until ``close``.
        self._hooks = [
            model.get_submodule(path).register_forward_pre_hook(partial(self._fill_empty, path))
            for path in self._below
        ]
        self._stopping = StoppingBlocks(model, blocks.modules)

    def begin(self, batch: Samples) -> StoppedPass:
        """A pass of the model on ``batch``."""
        blocks = self._blocks
        inputs = {name: x.to(blocks.device) for name, x in batch.inputs(blocks.dtype).items()}
        part = part_for(blocks.model, self._decoder, inputs)
        return self._stopping.begin(partial(part, **inputs, use_cache=False))

    def free_embeddings(self) -> None:
        """Frees the memory of embeddings and of parts outside of the decoder.

        Their parameters are read again if a pass computes with them once more.
        """
        model = self._blocks.model
        self._empty(
            name
            for name in self._later
            if isinstance(model.get_submodule(module_of(name)), nn.Embedding)
            or not self._in_decoder(name)
        )

    def close(self) -> None:
        """Takes the hooks off the model, whose passes have ended.

        Reference counts then free the model with this object; the garbage collector would come
        late, as it does not count the memory of a GPU.
        """
        for hook in self._hooks:
            hook.remove()

    def _fill(self, names: list[str]) -> None:
        on_disk = {name: self._blocks.outer[name] for name in names}
        model, values = self._blocks.model, dict[str, Tensor]()
        for name, tensors in on_disk.items():
            stored = {each: self._source.read(each).to(self._blocks.device) for each in tensors}
            refuse_infinite(stored)
            value, *others = stored.values()
            if others:
                elements = torch.cat([each.flatten() for each in (value, *others)])
                value = elements.view(model.get_parameter(name).shape)
            values[name] = value
        fill_parameters(model, self._blocks.computable(values))

    def _fill_empty(self, path: str, module: nn.Module, inputs: object) -> None:
        """Fills ``module`` at ``path``, to its depths, before it computes."""
        model = self._blocks.model
        empty = [name for name in self._below[path] if model.get_parameter(name).is_meta]
        if empty:
            self._fill(empty)

    def _empty(self, names: Iterable[str]) -> None:
        """Frees parameters. Modules ask for their shape and dtype even before they compute."""
        model, dtype = self._blocks.model, self._blocks.dtype
        for name in names:
            meta = model.get_parameter(name).data.to("meta", dtype)
            fill_parameters(model, {name: meta})

    def _in_decoder(self, name: str) -> bool:
        return not self._decoder or is_within(self._decoder, name)
