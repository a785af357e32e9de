"""The modules of a model as its checkpoint names them, with linears for every single expert.

transformers fuses the experts of a layer into tensors of three dimensions, and renames modules; for
engines and for algorithms, each expert has linears of its own. Where the checkpoint has them too,
their places are traced by sending numbered elements through transformers' own conversion to disk.
The separate experts are compared with the fused module on random tokens. No architecture is named
here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import block_of, local_of, module_of, relative_name, split_name
from qplug.checkpoint.stacked import Cut
from qplug.errors import QplugError
from qplug.model.block_list import decoder_blocks
from qplug.model.disk_names import DiskNames, disk_names
from qplug.model.expert_layout import Layout, Part
from qplug.model.experts import Experts
from qplug.model.joined_on_disk import joined_on_disk
from qplug.model.layout_trial import agrees
from qplug.model.placed import Placement
from qplug.model.quiet import quiet_transformers
from qplug.model.stacked_experts import stacked_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Rows and columns of each expert in the numbered tensor; two fused linears take half of the rows.
_ROWS, _COLUMNS = 4, 3


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
    layouts = _Layouts()
    modules = blocks_by_name(model, blocks)
    in_memory = decoder_blocks(model, Path(str(model.config.name_or_path)))
    # First, as a conversion looks at all modules of the model, and each expert will be some.
    traces = {
        name: _trace(model, name, names)
        for name, parts in names.parts.items()
        if _are_experts(parts)
        and module_of(name) not in stacks
        and block_of(name, in_memory) is not None
    }
    for (block, module), before in zip(modules.items(), in_memory, strict=True):
        placement = Placement(module)
        joined = _place_joined(placement, model, before, module, block, names, stacks)
        for path in dict.fromkeys(module_of(local) for local, _ in module.named_parameters()):
            full, part = f"{before}.{path}" if path else before, module.get_submodule(path)
            own = [f"{full}.{local}" for local, _ in part.named_parameters(recurse=False)]
            own = [name for name in own if name not in joined]
            if not own:
                continue
            stack, layout = stacks.get(full), None
            if stack is not None:
                if stack.is_apart(stored):
                    placement.module(path, relative_name(block, stack.experts))
                    layout = stack.layout
                else:
                    for parameter, on_disk in stack.stored.items():
                        placement.parameter(
                            f"{path}.{parameter}",
                            relative_name(block, on_disk),
                            turned=parameter in stack.turned,
                        )
            elif _are_experts(names.parts.get(own[0], ())):
                traced = [traces.get(name) or _trace(model, name, names) for name in own]
                placement.module(path, relative_name(block, traced[0][0]))
                layout = layouts.of(full, part, [each for _, parts in traced for each in parts])
            else:
                _place(placement, model, before, path, own, block, names)
            if layout is not None:
                parent, local = split_name(path)
                module.get_submodule(parent).add_module(local, Experts(part, layout))
        placement.carry_out()
        for local, _ in module.named_parameters():
            if f"{block}.{local}" not in stored:
                raise _unknown(f"{block}.{local}")
    return modules


def _are_experts(tensors: Sequence[str]) -> bool:
    """Whether all ``tensors`` on disk belong to linears of numbered modules."""
    numbers = [local_of(module_of(module_of(name))) for name in tensors]
    return bool(numbers) and all(number.isdigit() for number in numbers)


def _place_joined(
    placement: Placement,
    model: PreTrainedModel,
    before: str,
    module: nn.Module,
    block: str,
    names: DiskNames,
    stacks: Collection[str],
) -> set[str]:
    """Gives the parameters of a block that are joined on disk their tensors there; returns them.

    ``before`` and ``block``: the names of the block ``module`` in memory and on disk. ``stacks``:
    the modules of experts whose tensors are stacked.
    """
    apart = [
        name
        for local, _ in module.named_parameters()
        if (name := f"{before}.{local}") not in names.of_parameter
        and not _are_experts(names.parts.get(name, ()))
        and module_of(name) not in stacks
    ]
    if all(len(names.parts.get(name, ())) > 1 for name in apart):
        return set()
    tensors = joined_on_disk(
        model, apart, names.parts, lambda values: _all_converted(model, values)
    )
    if tensors is None:
        raise _unknown(apart[0])
    of_linears: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        for name, rows in (tensor.rows or {}).items():
            linear, local = split_name(name)
            of_linears.setdefault(linear, {})[local] = rows
    for linear, rows_of in of_linears.items():
        own = {local for local, _ in model.get_submodule(linear).named_parameters(recurse=False)}
        if own != rows_of.keys() or len({tuple(rows.tolist()) for rows in rows_of.values()}) > 1:
            raise _unknown(f"{linear}.weight")
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
            raise _unknown(name)
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
        _converted(model, name, numbers).items(), key=lambda item: int(item[1].flatten()[0])
    )
    if not torch.equal(torch.cat([values.flatten() for _, values in parts]), numbers.flatten()):
        raise _unknown(name)
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
        converted = _converted(model, name, numbers)
    except QplugError:
        return None
    parts = sorted(converted.items(), key=lambda item: int(item[1].flatten()[0]))
    found = tuple(on_disk for on_disk, _ in parts)
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


# --- experts that the checkpoint has one by one ---------------------------------------------------


def _trace(model: PreTrainedModel, name: str, names: DiskNames) -> tuple[str, list[Part]]:
    """The name on disk of the fused experts with the parameter ``name``, and the linears in it."""
    real = model.get_parameter(name).shape
    if len(real) != 3:
        raise _unknown(name)
    shape = (real[0], _ROWS, _COLUMNS)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    on_disk = _converted(model, name, numbers)
    parts: list[Part] = []
    for tensor, values in on_disk.items():
        linear, local = split_name(tensor)
        expert, linear = split_name(linear)
        _, number = split_name(expert)
        start = int(values.flatten()[0]) // _COLUMNS % _ROWS
        cut = Cut(start // max(1, len(values)), _ROWS // max(1, len(values)))
        whole = local == "weight" and number.isdigit()
        if not (whole and torch.equal(values, cut.of(numbers[int(number)]))):
            raise _unknown(name)
        parts.append(Part(linear, local_of(name), cut))
    distinct = list(dict.fromkeys(parts))
    # The checkpoint may have older names than the conversion gives: those of its own tensors count.
    own = {module_of(module_of(module_of(each))) for each in names.parts[name]}
    linears = {local_of(module_of(each)) for each in names.parts[name]}
    if len(own) != 1 or not {part.linear for part in distinct} <= linears:
        raise _unknown(name)
    if len(parts) != shape[0] * len(distinct):
        raise _unknown(name)
    return own.pop(), distinct


class _Layouts:
    """Layouts of fused modules; each is compared once with what modules of a class compute."""

    def __init__(self) -> None:
        self._agreed: set[tuple[type, Layout]] = set()

    def of(self, path: str, fused: nn.Module, parts: Sequence[Part]) -> Layout:
        """The layout of the module ``fused`` at ``path``. Raises QplugError if it is unknown."""
        by_parameter: dict[str, list[Part]] = {}
        for part in sorted(parts, key=lambda part: part.cut.index):
            by_parameter.setdefault(part.fused, []).append(part)
        # transformers uses this name for the output linear of all fused experts.
        last = by_parameter.pop("down_proj", [])
        if len(last) != 1 or len(by_parameter) != 1:
            raise _unknown(path)
        (readers,) = by_parameter.values()
        count = len(fused.get_parameter(last[0].fused))
        for returns_others in (False, True):
            layout = Layout(count, tuple(readers), last[0], returns_others=returns_others)
            if (type(fused), layout) in self._agreed or agrees(fused, layout):
                self._agreed.add((type(fused), layout))
                return layout
        raise _unknown(path)


def _converted(model: PreTrainedModel, name: str, values: Tensor) -> dict[str, Tensor]:
    """The tensors on disk, by name, that hold the parameter ``name`` if it has ``values``."""
    return _all_converted(model, {name: values})


def _all_converted(model: PreTrainedModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on disk, by name, that hold the parameters with these ``values``."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with quiet_transformers():
            on_disk: dict[str, Tensor] = revert_weight_conversion(model, dict(values))
    except Exception as error:  # a conversion may need more tensors than these
        raise _unknown(next(iter(values))) from error
    return on_disk


def _unknown(name: str) -> QplugError:
    return QplugError(
        f"{name}: is stored in parts that qplug cannot put together, so algorithms that need "
        "calibration data cannot take this architecture; use one that needs none, such as rtn"
    )
