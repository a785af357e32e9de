"""The experts that a checkpoint stacks in tensors of three axes, under names of single experts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qplug.api import Checkpoint
from qplug.checkpoint.names import local_of, module_of
from qplug.checkpoint.stacked import Cut, cut_tensor, joined
from qplug.errors import QplugError
from qplug.model.disk_names import DiskNames, disk_names
from qplug.model.expert_layout import Layout
from qplug.model.layout_trial import find_layout
from qplug.model.to_disk import converted

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stack:
    """The experts of a layer whose tensors are stacked on disk as they are in memory.

    ``module``: the path in memory. ``experts``: the name of all experts, under which each expert
    has its linears. ``layout``: of the parameters in memory. ``stored``: the names on disk of each
    parameter: one, or one for each linear that has a part of its rows, in their order. Those in
    ``turned`` have their last two axes the other way round there.
    """

    module: str
    experts: str
    layout: Layout
    stored: Mapping[str, tuple[str, ...]]
    turned: frozenset[str]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors on disk."""
        return tuple(name for names in self.stored.values() for name in names)

    def linears(self) -> Iterator[tuple[str, str, int, Cut]]:
        """Yields the tensor of each linear, the stacked tensor that has it, its expert, and cut."""
        for number in range(self.layout.count):
            for part in self.layout.parts:
                linear = f"{self.experts}.{number}.{part.linear}"
                turned = part.cut.transposed ^ (part.fused in self.turned)
                stored, cut = self._place(part.fused, replace(part.cut, transposed=turned))
                yield f"{linear}.weight", stored, number, cut
                if f"{part.fused}_bias" in self.stored:
                    stored, cut = self._place(f"{part.fused}_bias", part.cut)
                    yield f"{linear}.bias", stored, number, cut

    def axis(self, parameter: str) -> int:
        """The axis of ``parameter`` along which it is cut into linears."""
        cuts = [part.cut for part in self.layout.parts if part.fused == parameter]
        return 2 if any(cut.transposed for cut in cuts) else 1

    def _place(self, parameter: str, cut: Cut) -> tuple[str, Cut]:
        """The tensor on disk that has what ``cut`` takes from ``parameter``, and the cut of it."""
        stored = self.stored[parameter]
        if len(stored) == 1:
            return stored[0], cut
        return stored[cut.index], Cut(transposed=cut.transposed)

    def is_apart(self, names: Collection[str]) -> bool:
        """Whether ``names`` has tensors of single experts instead of the stacked ones."""
        return not any(name in names for name in self.tensors)


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
        stored = {n: s for n in own if (s := _stored(names, f"{path}.{n}", shapes))}
        if len(stored) < len(own):
            continue
        key = (type(module), *((n, len(p), p.ndim) for n, p in own.items()))
        if key not in layouts:
            layouts[key] = find_layout(module)
        layout = layouts[key]
        parent = {
            module_of(name.removesuffix(".weight")) for each in stored.values() for name in each
        }
        if layout is not None and len(parent) == 1 and _fits(model, path, layout, stored):
            above = parent.pop()
            experts = above if local_of(above) == "experts" else f"{above}.experts"
            turned = (
                name
                for name, (on_disk, *others) in stored.items()
                if not others and shapes.get(on_disk, own[name].shape) != own[name].shape
            )
            stacks.append(Stack(path, experts, layout, stored, frozenset(turned)))
    return tuple(stacks)


def _stored(
    names: DiskNames, parameter: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """The tensors on disk that have ``parameter`` of all experts: one, or several with some rows.

    Empty if there are no such tensors.
    """
    whole = names.whole(parameter)
    if whole is not None:
        return (whole,)
    parts = names.parts.get(parameter, ())
    known = {**names.shapes, **shapes}
    return parts if all(len(known.get(part, ())) == 3 for part in parts) else ()


def _fits(
    model: PreTrainedModel, path: str, layout: Layout, stored: Mapping[str, tuple[str, ...]]
) -> bool:
    """Whether each linear cut from a parameter in several tensors has one of these, in order.

    ``path``: of the module of the experts.
    """
    for parameter, tensors in stored.items():
        if len(tensors) == 1:
            continue
        parts = [part for part in layout.parts if part.fused == parameter]
        if len(parts) != len(tensors):
            return False
        numbers = torch.arange(layout.count * 12 * len(parts)).view(layout.count, -1, 6)
        try:
            found = converted(model, {f"{path}.{parameter}": numbers})
        except QplugError:
            return False
        for part, tensor in zip(
            sorted(parts, key=lambda part: part.cut.index), tensors, strict=True
        ):
            cut, values = part.cut, found.get(tensor)
            rows = numbers.mT if cut.transposed else numbers
            own = rows[:, cut.index * rows.shape[1] // cut.count :][:, : rows.shape[1] // cut.count]
            own = own.mT if cut.transposed else own
            if cut.interleaved or values is None or not torch.equal(values, own):
                return False
    return True


def experts_apart(model: PreTrainedModel, names: DiskNames, checkpoint: Checkpoint) -> Checkpoint:
    """Returns ``checkpoint`` with stacked tensors cut: a tensor for each linear of an expert.

    ``names``: on disk, of the parameters of ``model``.
    """
    tensors = dict(checkpoint.tensors)
    for stack in stacked_experts(model, names, checkpoint.shapes):
        if any(name not in tensors for name in stack.tensors):
            continue
        for name, stacked, number, cut in stack.linears():
            tensors[name] = cut_tensor(checkpoint.tensors[stacked], stacked, number, cut)
        for stacked in stack.tensors:
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
