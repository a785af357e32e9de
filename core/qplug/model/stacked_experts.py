"""The experts that a checkpoint stacks in tensors of three axes, under names of single experts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qplug.api import Checkpoint
from qplug.checkpoint.names import local_of, module_of
from qplug.checkpoint.stacked import Cut, cut_tensor, joined
from qplug.model.disk_names import DiskNames, disk_names
from qplug.model.expert_layout import Layout
from qplug.model.layout_trial import find_layout

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


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


def experts_apart(model: PreTrainedModel, names: DiskNames, checkpoint: Checkpoint) -> Checkpoint:
    """Returns ``checkpoint`` with stacked tensors cut: a tensor for each linear of an expert.

    ``names``: on disk, of the parameters of ``model``.
    """
    tensors = dict(checkpoint.tensors)
    for stack in stacked_experts(model, names, checkpoint.shapes):
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
