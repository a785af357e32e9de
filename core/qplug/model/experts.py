"""The modules of a model as its checkpoint names them, with linears for every single expert.

transformers fuses the experts of a layer into tensors of three dimensions, and renames modules; for
engines and for algorithms, each expert has linears of its own. Where the checkpoint has them too,
their places are traced by sending numbered elements through transformers' own conversion to disk.
The separate experts are compared with the fused module on random tokens. No architecture is named
here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qplug.api import Checkpoint
from qplug.checkpoint.names import local_of, module_of, relative_name, split_name
from qplug.checkpoint.stacked import Cut, cut_tensor, joined
from qplug.errors import QplugError
from qplug.model.block_list import decoder_blocks
from qplug.model.disk_names import DiskNames, disk_names
from qplug.model.expert_layout import Layout, Part, agrees, find_layout
from qplug.model.placed import Placement
from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Rows and columns of each expert in the numbered tensor; two fused linears take half of the rows.
_ROWS, _COLUMNS = 4, 3


class Experts(nn.Module):
    """The experts of a layer, by number; called like the fused module that it replaces.

    ``readers``: the names of an expert's linears that read tokens. ``last``: the name of its output
    linear. ``gathers``: whether it is given the tokens of the layer, of which each expert reads
    some; else each expert has a copy of the tokens of its own, zero for tokens that it is not
    given. ``rows[e]``: the tokens that expert ``e`` was given in the last pass, int64, ascending.
    ``sees_all``: whether experts that gather compute all tokens, of which the output has those that
    were routed to them.
    """

    def __init__(self, fused: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.readers = tuple(part.linear for part in layout.readers)
        self.last, self.gathers = layout.last.linear, layout.gathers
        self.rows: tuple[Tensor, ...] = ()
        self.sees_all = False
        self.__dict__["_fused"] = fused  # not registered: the linears have its parameters
        self.__dict__["_layout"] = layout
        parameters = dict(fused.named_parameters(recurse=False))
        for number in range(layout.count):
            expert = nn.Module()
            for part in layout.parts:
                bias = parameters.get(f"{part.fused}_bias")
                expert.add_module(
                    part.linear,
                    _linear(
                        part.cut.of(parameters[part.fused][number]),
                        None if bias is None else part.cut.of(bias[number]),
                    ),
                )
            self.add_module(str(number), expert)
        for name in parameters:
            fused._parameters[name] = None

    def forward(
        self, tokens: Tensor, chosen: Tensor | None = None, shares: Tensor | None = None
    ) -> Tensor:
        """``tokens: [tokens, width]``; ``chosen``, ``shares``: ``[tokens, experts of a token]``.

        Without ``chosen``, ``tokens`` has a copy of all tokens for each expert.
        """
        if chosen is None or shares is None:
            return self._of_copies(tokens)
        per_token = chosen.shape[-1]
        order = torch.argsort(chosen.flatten(), stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self._modules)).tolist()
        places = order.split(counts)[: len(self._modules)]
        routed = tuple(place // per_token for place in places)
        self.rows = routed
        if self.sees_all:
            self.rows = (torch.arange(len(tokens), device=tokens.device),) * len(routed)
        outputs = torch.zeros(
            len(order), tokens.shape[-1], dtype=tokens.dtype, device=tokens.device
        )
        for expert, place, rows in zip(self.children(), places, routed, strict=True):
            if self.sees_all:
                outputs[place] = self._output(expert, tokens)[rows]
            elif len(rows):
                outputs[place] = self._output(expert, tokens[rows])
        weighted = outputs.unflatten(0, (-1, per_token)) * shares.unsqueeze(-1)
        mixed: Tensor = weighted.sum(1).to(tokens.dtype)
        return mixed

    def _of_copies(self, tokens: Tensor) -> Tensor:
        copies = tokens.unflatten(0, (len(self._modules), -1))
        self.rows = tuple(copy.any(-1).nonzero().flatten() for copy in copies)
        outputs = torch.zeros_like(copies)
        for number, (expert, rows) in enumerate(zip(self.children(), self.rows, strict=True)):
            if len(rows):
                outputs[number, rows] = self._output(expert, copies[number, rows])
        return outputs.flatten(0, 1)

    def _output(self, expert: nn.Module, x: Tensor) -> Tensor:
        layout: Layout = self.__dict__["_layout"]
        inner = layout.inner(
            self.__dict__["_fused"], [expert.get_submodule(name)(x) for name in self.readers]
        )
        output: Tensor = expert.get_submodule(self.last)(inner)
        return output


@contextmanager
def seeing_all(block: nn.Module) -> Iterator[None]:
    """Within it, every expert of ``block`` computes all tokens of its layer."""
    layers = [part for part in block.modules() if isinstance(part, Experts)]
    for layer in layers:
        layer.sees_all = True
    try:
        yield
    finally:
        for layer in layers:
            layer.sees_all = False


def rows_of(block: nn.Module, path: str) -> Tensor | None:
    """The tokens that the linear at ``path`` reads in the current pass, int64; None if all."""
    parent, number = split_name(module_of(path))
    experts = block.get_submodule(parent)
    return experts.rows[int(number)] if isinstance(experts, Experts) else None


@torch.no_grad()
def as_on_disk(
    model: PreTrainedModel,
    blocks: Sequence[str],
    stored: Collection[str],
    names: DiskNames | None = None,
) -> dict[str, nn.Module]:
    """Give the parameters in the blocks of ``model`` the names and shapes that they have on disk.

    ``blocks``: the names of the blocks on disk; ``stored``: the names of the checkpoint's tensors;
    ``names``: their map, if it was made already. Returns the blocks by name; within a block,
    modules have their names on disk. The outputs of ``model`` stay the same; the weights of experts
    are views of its own tensors. Raises QplugError for an unknown layout.
    """
    names = disk_names(model, stored) if names is None else names
    stacks = {stack.module: stack for stack in stacked_experts(model, names)}
    layouts = _Layouts()
    modules = blocks_by_name(model, blocks)
    in_memory = decoder_blocks(model, Path(str(model.config.name_or_path)))
    for (block, module), before in zip(modules.items(), in_memory, strict=True):
        placement = Placement(module)
        for path in dict.fromkeys(module_of(local) for local, _ in module.named_parameters()):
            full, part = f"{before}.{path}" if path else before, module.get_submodule(path)
            own = [f"{full}.{local}" for local, _ in part.named_parameters(recurse=False)]
            stack, layout = stacks.get(full), None
            if stack is not None:
                if stack.is_apart(stored):
                    placement.module(path, relative_name(block, stack.experts))
                    layout = stack.layout
            elif _are_experts(names.parts.get(own[0], ())):
                traced = [_trace(model, name, names) for name in own]
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


# --- experts that the checkpoint stacks -----------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """The experts of a layer whose tensors are stacked on disk as they are in memory.

    ``module``: the path in memory. ``experts``: the name of all experts, under which each expert
    has its linears. ``layout``: of the parameters in memory. ``stored``: the name on disk of each
    parameter; those in ``turned`` have their last two axes the other way round there.
    """

    module: str
    experts: str
    layout: Layout
    stored: Mapping[str, str]
    turned: frozenset[str]

    def linears(self) -> Iterator[tuple[str, str, int, Cut]]:
        """Yields the tensor of each linear, the stacked tensor that has it, its expert, and cut."""
        for number in range(self.layout.count):
            for part in self.layout.parts:
                linear = f"{self.experts}.{number}.{part.linear}"
                turned = part.cut.transposed ^ (part.fused in self.turned)
                cut = replace(part.cut, transposed=turned)
                yield f"{linear}.weight", self.stored[part.fused], number, cut
                if f"{part.fused}_bias" in self.stored:
                    yield f"{linear}.bias", self.stored[f"{part.fused}_bias"], number, part.cut

    def is_apart(self, names: Collection[str]) -> bool:
        """Whether ``names`` has tensors of single experts instead of the stacked ones."""
        return not any(name in names for name in self.stored.values())


def stacked_experts(
    model: PreTrainedModel,
    names: DiskNames,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Stack, ...]:
    """Returns the experts of ``model`` whose tensors are stacked on disk.

    ``shapes``: of the tensors on disk, by name; by default those that transformers would write.
    """
    shapes = names.shapes if shapes is None else shapes
    layouts: dict[tuple[object, ...], Layout | None] = {}
    stacks = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if sum(parameter.ndim == 3 for parameter in own.values()) != 2:
            continue
        stored = {n: s for n in own if (s := names.whole(f"{path}.{n}")) is not None}
        if len(stored) < len(own):
            continue
        key = (type(module), *((n, len(p), p.ndim) for n, p in own.items()))
        if key not in layouts:
            layouts[key] = find_layout(module)
        layout = layouts[key]
        parent = {module_of(name.removesuffix(".weight")) for name in stored.values()}
        if layout is not None and len(parent) == 1:
            above = parent.pop()
            experts = above if local_of(above) == "experts" else f"{above}.experts"
            turned = (n for n, s in stored.items() if shapes.get(s, own[n].shape) != own[n].shape)
            stacks.append(Stack(path, experts, layout, stored, frozenset(turned)))
    return tuple(stacks)


def _converted(model: PreTrainedModel, name: str, values: Tensor) -> dict[str, Tensor]:
    """The tensors on disk, by name, that hold the parameter ``name`` if it has ``values``."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with quiet_transformers():
            on_disk: dict[str, Tensor] = revert_weight_conversion(model, {name: values})
    except Exception as error:  # a conversion may need more tensors than this one
        raise _unknown(name) from error
    return on_disk


def experts_apart(model: PreTrainedModel, checkpoint: Checkpoint) -> Checkpoint:
    """Returns ``checkpoint`` with stacked tensors cut: a tensor for each linear of an expert."""
    tensors = dict(checkpoint.tensors)
    shapes = {name: tensor.spec.shape for name, tensor in tensors.items()}
    for stack in stacked_experts(model, disk_names(model, tensors), shapes):
        if any(name not in tensors for name in stack.stored.values()):
            continue
        for name, stacked, number, cut in stack.linears():
            tensors[name] = cut_tensor(checkpoint.tensors[stacked], stacked, number, cut)
        for stacked in stack.stored.values():
            del tensors[stacked]
    return replace(checkpoint, tensors=tensors)


def with_stacked_experts(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors ``state`` with experts stacked as ``model`` has them on disk.

    Tensors of experts that are stacked already, or that the model has one by one, stay as they are.
    """
    stacked = dict(state)
    for stack in stacked_experts(model, disk_names(model, state)):
        parts: dict[str, dict[int, dict[Cut, Tensor]]] = {}
        for name, whole, number, cut in stack.linears():
            if name in stacked:
                parts.setdefault(whole, {}).setdefault(number, {})[cut] = stacked.pop(name)
        for whole, experts in parts.items():
            stacked[whole] = joined(experts)
    return stacked


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
        layout = Layout(len(fused.get_parameter(last[0].fused)), tuple(readers), last[0])
        if (type(fused), layout) not in self._agreed and not agrees(fused, layout):
            raise _unknown(path)
        self._agreed.add((type(fused), layout))
        return layout


# --- modules --------------------------------------------------------------------------------------


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear that uses the memory of ``weight: [out, in]`` and ``bias: [out]``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _unknown(name: str) -> QplugError:
    return QplugError(
        f"{name}: is stored in parts that qplug cannot put together, so algorithms that need "
        "calibration data cannot take this architecture; use one that needs none, such as rtn"
    )
