"""The decoder blocks of a model without weights, which compute with parameters given by call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from qplug.api import ModelView
from qplug.api.scheme import Scheme
from qplug.api.tensors import Checkpoint
from qplug.calibration.batches import passing_dtype
from qplug.checkpoint.names import block_of
from qplug.errors import QplugError
from qplug.model.block_call import BlockCall, Output
from qplug.model.block_list import decoder_blocks
from qplug.model.experts import with_experts_together
from qplug.model.on_disk import as_on_disk, modules_of_blocks, parts_in_order
from qplug.model.online_rotation import rotate_inputs
from qplug.model.rounding_hooks import InputRounding, rounding_inputs
from qplug.model.skeleton import Skeleton
from qplug.model.to_disk import TAKES_NO_DATA


class BlockModules:
    """The blocks of a hollow model of ``source``, by full name; linears are named as on disk.

    ``parameters``: the names of each block's parameters, relative to the block.
    ``in_memory``: the paths of the blocks in ``model``, in the same order.
    ``outer``: the tensors on disk of each parameter outside of the blocks, by name in memory; if
    there are several, the parameter has their elements one after the other.
    ``dtype``: what blocks compute in.
    """

    def __init__(
        self,
        source: Checkpoint,
        view: ModelView,
        schemes: Mapping[str, Scheme],
        device: torch.device,
        skeleton: Skeleton,
        *,
        online: Sequence[str] = (),
    ) -> None:
        """Takes the model of ``skeleton``, which is that of ``source``.

        ``online``: linears whose inputs are rotated while the model runs.
        """
        names = skeleton.names(source.tensors)
        self.model = skeleton.take().eval()
        self.in_memory = decoder_blocks(self.model, source.folder)
        _refuse_ties(self.model, self.in_memory)
        self.outer: dict[str, tuple[str, ...]] = {
            name: (on_disk,)
            for name, on_disk in names.of_parameter.items()
            if block_of(on_disk, view.blocks) is None
        }
        for name in names.parts:
            if block_of(name, self.in_memory) is None:
                parts = parts_in_order(self.model, name, names)
                if parts is not None:
                    self.outer[name] = parts
        self.modules = as_on_disk(
            self.model, view.blocks, source.tensors, names, shapes=source.shapes
        )
        rotate_inputs(modules_of_blocks(self.modules), online)
        self.parameters = {
            name: [
                local
                for local, value in block.state_dict(keep_vars=True).items()
                if isinstance(value, nn.Parameter) or f"{name}.{local}" in source.tensors
            ]
            for name, block in self.modules.items()
        }
        self.device, self.dtype = device, passing_dtype(device, getattr(torch, view.dtype))
        self._schemes = schemes
        self._tied = {name for name, block in self.modules.items() if _has_ties(block)}
        self._buffers = {n for block in self.modules.values() for n, _ in block.named_buffers()}

    def reassign(self, schemes: Mapping[str, Scheme]) -> None:
        """Takes other ``schemes``, by which ``rounding_inputs`` rounds."""
        self._schemes = schemes

    def computable(
        self, values: Mapping[str, Tensor], on_host: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """``values`` on the device and in the dtype of blocks; buffers keep their own dtype.

        Those in ``on_host`` stay where they are.
        """
        return {
            name: value.to(
                value.device if name in on_host else self.device,
                None if name in self._buffers else self.dtype,
            )
            for name, value in values.items()
        }

    def parameters_of(
        self, block: str, values: Mapping[str, Tensor], on_host: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The parameters of ``block`` among ``values`` (by relative names), ``computable``."""
        return self.computable({local: values[local] for local in self.parameters[block]}, on_host)

    def computing(
        self, block: str, parameters: Mapping[str, Tensor]
    ) -> Callable[[BlockCall], Output]:
        """A function that returns what ``block`` returns for a call with ``parameters``.

        It is for the hooks that the linears of the block have now.
        """
        module = self.modules[block]
        given = with_experts_together(module, parameters)
        return lambda call: call.run(module, given, tied=block in self._tied)

    def rounding_inputs(
        self, block: str, weights: Sequence[str], values: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Within it, the linears of ``weights`` read inputs that are rounded as by their schemes.

        ``weights`` and ``values`` go by names relative to ``block``; ``values`` holds the scales of
        static inputs, as ``input_scale`` of their linears.
        """
        roundings = {}
        for local in weights:
            path = local.removesuffix(".weight")
            scheme = self._schemes.get(f"{block}.{path}")
            if scheme is not None and scheme.activations is not None:
                scale = values.get(f"{path}.input_scale")
                scale = None if scale is None else scale.to(self.device)
                roundings[path] = InputRounding(scheme.activations, scale)
        return rounding_inputs(self.modules[block], roundings)


def _refuse_ties(model: nn.Module, blocks: Sequence[str]) -> None:
    """Raises QplugError if ``model`` computes with parameters of its ``blocks`` outside of them."""
    inside: set[int] = set()
    outside: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if block_of(name, blocks) is None:
            outside[id(parameter)] = name
        else:
            inside.add(id(parameter))
    shared = next((name for number, name in outside.items() if number in inside), None)
    if shared is not None:
        raise QplugError(
            f"{shared}: is a weight of a decoder block that the model computes with outside of its "
            f"blocks, too, {TAKES_NO_DATA}"
        )


def _has_ties(block: nn.Module) -> bool:
    """Whether a parameter of ``block`` goes by several names."""
    every = [*block.named_parameters(remove_duplicate=False)]
    return len(every) > len({id(parameter) for _, parameter in every})
