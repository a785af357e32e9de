"""The modules of a model as its checkpoint names them, with linears for every single expert.

transformers fuses the experts of a layer into tensors of three dimensions, and renames modules; for
engines and for algorithms, each expert has linears of its own. Where parts of a parameter lie on
disk is traced by sending numbered elements through transformers' own conversion. No architecture is
named here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import block_of, local_of, module_of, relative_name, split_name
from qplug.errors import QplugError
from qplug.model.block_list import decoder_blocks
from qplug.model.disk_names import DiskNames, disk_names
from qplug.model.experts import Experts
from qplug.model.joined_on_disk import joined_on_disk
from qplug.model.placed import Placement
from qplug.model.stacked_experts import Stack, stacked_experts
from qplug.model.to_disk import converted, unknown
from qplug.model.traced_experts import ExpertTrace, Layouts, are_experts, trace_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def as_on_disk(
    model: PreTrainedModel,
    blocks: Sequence[str],
    stored: Collection[str],
    names: DiskNames | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, nn.Module]:
    """Give the parameters in the blocks of ``model`` the names and shapes that they have on disk.

    ``blocks``: the names of the blocks on disk; ``stored``: the names of the checkpoint's tensors;
    ``names``: their map, if it was made already; ``shapes``: of the tensors, by name, by default
    those that transformers would write. Returns the blocks by name; within a block,
    modules have their names on disk. The outputs of ``model`` stay the same; the weights of experts
    are views of its own tensors. Raises QplugError for an unknown layout.
    """
    names = disk_names(model, stored) if names is None else names
    stacks = {stack.module: stack for stack in stacked_experts(model, names, shapes)}
    modules = blocks_by_name(model, blocks)
    in_memory = decoder_blocks(model, Path(str(model.config.name_or_path)))
    # First, as a conversion looks at all modules of the model, and each expert will be some.
    traces: dict[str, ExpertTrace] = {}
    for name, parts in names.parts.items():
        inside = block_of(name, in_memory) is not None
        if inside and are_experts(parts) and module_of(name) not in stacks:
            traces |= trace_experts(model, name, names)
    places = _Places(model, names, stored, stacks, traces)
    for (block, module), before in zip(modules.items(), in_memory, strict=True):
        places.give(block, module, before)
        for local, _ in module.named_parameters():
            if f"{block}.{local}" not in stored:
                raise unknown(f"{block}.{local}")
    return modules


class _Places:
    """Where ``stored``, the tensors of a checkpoint, have the parameters of ``model``.

    ``stacks``: the experts that are stacked on disk, by module; ``traces``: the parameters of those
    that are not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: DiskNames,
        stored: Collection[str],
        stacks: Mapping[str, Stack],
        traces: Mapping[str, ExpertTrace],
    ) -> None:
        self._model, self._names, self._stored = model, names, stored
        self._stacks, self._traces = stacks, traces
        self._layouts = Layouts()

    def give(self, block: str, module: nn.Module, before: str) -> None:
        """Gives the parts of ``module`` their places in ``block``.

        ``before``: the name of the block in memory.
        """
        placement = Placement(module)
        elsewhere = {*self._stacks, *self._traces}
        joined = _place_joined(
            placement, self._model, before, module, block, self._names, elsewhere
        )
        hosted: list[tuple[str, int, Experts]] = []
        for path in dict.fromkeys(module_of(local) for local, _ in module.named_parameters()):
            full, part = f"{before}.{path}" if path else before, module.get_submodule(path)
            own = [f"{full}.{local}" for local, _ in part.named_parameters(recurse=False)]
            own = [name for name in own if name not in joined]
            if full in self._stacks:
                self._give_stack(placement, self._stacks[full], block, module, path)
            elif own and own[0] in self._traces:
                traced = [self._traces[name] for name in own if name in self._traces]
                if len(traced) < len(own) or len({trace.first for trace in traced}) > 1:
                    raise unknown(full)
                place = relative_name(block, traced[0].experts)
                parts = [each for trace in traced for each in trace.parts]
                experts = Experts(part, self._layouts.of(full, part, parts))
                if traced[0].first:
                    hosted.append((place, traced[0].first, experts))
                    _put_unregistered(module, path, experts)
                else:
                    placement.module(path, place)
                    _put(module, path, experts)
            elif own:
                _place(placement, self._model, before, path, own, block, self._names)
        placement.carry_out()
        for place, first, experts in hosted:
            host = module.get_submodule(place)
            if not isinstance(host, Experts) or len(host) > first:
                raise unknown(f"{block}.{place}")
            host.host(experts, first)

    def _give_stack(
        self, placement: Placement, stack: Stack, block: str, module: nn.Module, path: str
    ) -> None:
        """Gives the experts at ``path`` of the block ``module`` the places of ``stack``."""
        if stack.is_apart(self._stored):
            placement.module(path, relative_name(block, stack.experts))
            _put(module, path, Experts(module.get_submodule(path), stack.layout))
            return
        for parameter, (on_disk, *others) in stack.stored.items():
            if others:
                names = [relative_name(block, each) for each in (on_disk, *others)]
                placement.several(f"{path}.{parameter}", names, stack.axis(parameter))
                continue
            placement.parameter(
                f"{path}.{parameter}",
                relative_name(block, on_disk),
                turned=parameter in stack.turned,
            )


def _put(module: nn.Module, path: str, part: nn.Module) -> None:
    """Registers ``part`` at ``path`` of ``module``."""
    parent, local = split_name(path)
    module.get_submodule(parent).add_module(local, part)


def _put_unregistered(module: nn.Module, path: str, part: nn.Module) -> None:
    """Makes ``part`` what the code of ``module`` calls at ``path``, and no module there."""
    parent, local = split_name(path)
    owner = module.get_submodule(parent)
    del owner._modules[local]
    owner.__dict__[local] = part


def _place_joined(
    placement: Placement,
    model: PreTrainedModel,
    before: str,
    module: nn.Module,
    block: str,
    names: DiskNames,
    experts: set[str],
) -> set[str]:
    """Gives the parameters of a block that are joined on disk their tensors there; returns them.

    ``before`` and ``block``: the names of the block ``module`` in memory and on disk. ``experts``:
    fused modules of experts, or their parameters, which have other places.
    """
    apart = [
        name
        for local, _ in module.named_parameters()
        if (name := f"{before}.{local}") not in names.of_parameter
        and not are_experts(names.parts.get(name, ()))
        and not {name, module_of(name)} & experts
    ]
    if all(len(names.parts.get(name, ())) > 1 for name in apart):
        return set()
    tensors = joined_on_disk(model, apart, names.parts)
    if tensors is None:
        raise unknown(apart[0])
    of_linears: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        for name, rows in (tensor.rows or {}).items():
            linear, local = split_name(name)
            of_linears.setdefault(linear, {})[local] = rows
    for linear, rows_of in of_linears.items():
        own = {local for local, _ in model.get_submodule(linear).named_parameters(recurse=False)}
        if own != rows_of.keys() or len({tuple(rows.tolist()) for rows in rows_of.values()}) > 1:
            raise unknown(f"{linear}.weight")
    for tensor in tensors:
        places = tensor.elements if tensor.rows is None else tensor.rows
        placement.joined(
            relative_name(block, tensor.name),
            tensor.shape,
            {relative_name(before, name): each for name, each in places.items()},
            by_rows=tensor.rows is not None,
        )
    return {name for tensor in tensors for name in tensor.elements}


def _place(
    placement: Placement,
    model: PreTrainedModel,
    before: str,
    path: str,
    parameters: Sequence[str],
    block: str,
    names: DiskNames,
) -> None:
    """Gives the module at ``path`` of a block, and its ``parameters``, their names on disk.

    ``before`` and ``block``: the names of the block in memory and on disk. Raises QplugError for a
    parameter that the checkpoint does not have, alone or in parts.
    """
    alone: dict[str, str] = {}
    for name in parameters:
        if name in names.of_parameter:
            alone[name] = names.of_parameter[name]
        elif name in names.parts:
            parts = [
                (relative_name(block, on_disk), values) for on_disk, values in _parts(model, name)
            ]
            placement.parts(relative_name(before, name), parts)
        else:
            raise unknown(name)
    modules = {module_of(on_disk) for on_disk in alone.values()}
    same = all(local_of(name) == local_of(on_disk) for name, on_disk in alone.items())
    if same and len(modules) == 1 and len(alone) == len(parameters):
        placement.module(path, relative_name(block, modules.pop()))
        return
    for name, on_disk in alone.items():
        placement.parameter(relative_name(before, name), relative_name(block, on_disk))


def _parts(model: PreTrainedModel, name: str) -> list[tuple[str, Tensor]]:
    """The tensors on disk, in order, whose elements are those of the parameter ``name``.

    The tensors have no memory. Raises QplugError if they are not the parameter's elements in order.
    """
    parameter = model.get_parameter(name)
    numbers = torch.arange(parameter.numel()).view(parameter.shape)
    parts = sorted(
        converted(model, {name: numbers}).items(), key=lambda item: int(item[1].flatten()[0])
    )
    if not torch.equal(torch.cat([values.flatten() for _, values in parts]), numbers.flatten()):
        raise unknown(name)
    return [
        (on_disk, torch.empty_like(values, device="meta", dtype=parameter.dtype))
        for on_disk, values in parts
    ]


def parts_in_order(model: PreTrainedModel, name: str, names: DiskNames) -> tuple[str, ...] | None:
    """The tensors on disk that follow one another in the parameter ``name``; None if they do not.

    If there is one, it has the shape of the parameter.
    """
    parameter = model.get_parameter(name)
    # Two columns tell as much as all: the embeddings of a model may be its largest matrix.
    shape = (*parameter.shape[:1], 2) if parameter.ndim == 2 else tuple(parameter.shape)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    try:
        on_disk = converted(model, {name: numbers})
    except QplugError:
        return None
    parts = sorted(on_disk.items(), key=lambda item: int(item[1].flatten()[0]))
    found = tuple(each for each, _ in parts)
    joined = torch.cat([values.flatten() for _, values in parts])
    if {*found} != {*names.parts[name]} or not torch.equal(joined, numbers.flatten()):
        return None
    if len(parts) == 1 and parts[0][1].shape != numbers.shape:
        return None
    return found


def blocks_by_name(model: PreTrainedModel, blocks: Sequence[str]) -> dict[str, nn.Module]:
    """Returns the decoder blocks of ``model`` by their names on disk, ``blocks``."""
    in_memory = decoder_blocks(model, Path(str(model.config.name_or_path)))
    return {name: model.get_submodule(path) for path, name in zip(in_memory, blocks, strict=True)}


def modules_of_blocks(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns all modules inside of ``blocks`` by their full names."""
    return {
        f"{name}.{path}": module
        for name, block in blocks.items()
        for path, module in block.named_modules()
        if path
    }
