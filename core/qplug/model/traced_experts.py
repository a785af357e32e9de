"""Where a checkpoint has the single experts of a module that transformers fuses.

Their places are traced by sending numbered elements through transformers' own conversion to disk.
The separate experts are compared with the fused module on random tokens. No architecture is named
here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import local_of, module_of, split_name
from qplug.checkpoint.stacked import Cut
from qplug.errors import QplugError
from qplug.model.disk_names import DiskNames
from qplug.model.expert_layout import Layout, Part
from qplug.model.layout_trial import agrees
from qplug.model.to_disk import converted, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Rows and columns of each expert in the numbered tensor; two fused linears take half of the rows.
_ROWS, _COLUMNS = 4, 3


def are_experts(tensors: Sequence[str]) -> bool:
    """Whether all ``tensors`` on disk belong to linears of numbered modules."""
    numbers = [local_of(module_of(module_of(name))) for name in tensors]
    return bool(numbers) and all(number.isdigit() for number in numbers)


@dataclass(frozen=True)
class ExpertTrace:
    """Where a checkpoint has a parameter of fused experts: the linears ``parts`` of each expert.

    ``experts``: the name there of all experts; ``first``: the number of the first one.
    """

    experts: str
    parts: tuple[Part, ...]
    first: int


def trace_experts(model: PreTrainedModel, name: str, names: DiskNames) -> dict[str, ExpertTrace]:
    """Where the checkpoint has ``name``, a parameter of fused experts, by name of the parameter.

    The result has other parameters, too, if the checkpoint numbers the experts of several modules
    in one list.
    """
    numbers = _numbered(model, [name])
    try:
        on_disk = converted(model, numbers)
    except QplugError:
        numbers = _numbered(model, _siblings(model, name))
        on_disk = converted(model, numbers)
    # The checkpoint may have older names than the conversion gives: those of its own tensors count.
    own = {module_of(module_of(module_of(each))) for each in names.parts[name]}
    linears = {local_of(module_of(each)) for each in names.parts[name]}
    if len(own) != 1:
        raise unknown(name)
    (experts,) = own
    return {each: _traced(each, numbers[each], on_disk, experts, linears) for each in numbers}


def _siblings(model: PreTrainedModel, name: str) -> list[str]:
    """The parameters of three axes in the modules next to that of ``name``, by the same name."""
    around, local = module_of(module_of(module_of(name))), local_of(name)
    return [
        f"{around}.{each}"
        for each, parameter in model.get_submodule(around).named_parameters()
        if local_of(each) == local and parameter.ndim == 3
    ]


def _numbered(model: PreTrainedModel, parameters: Sequence[str]) -> dict[str, Tensor]:
    """Small tensors of as many experts as ``parameters`` have, whose elements are numbers."""
    numbers, start = dict[str, Tensor](), 0
    for name in parameters:
        real = model.get_parameter(name).shape
        if len(real) != 3:
            raise unknown(name)
        shape = torch.Size((real[0], _ROWS, _COLUMNS))
        numbers[name] = torch.arange(start, start + shape.numel()).view(shape)
        start += shape.numel()
    return numbers


def _traced(
    name: str,
    numbers: Tensor,
    on_disk: Mapping[str, Tensor],
    experts: str,
    linears: Collection[str],
) -> ExpertTrace:
    """Where the parameter ``name`` lies, whose elements are ``numbers`` among those ``on_disk``."""
    parts: list[Part] = []
    found: set[int] = set()
    start = int(numbers.flatten()[0])
    for tensor, values in on_disk.items():
        place = int(values.flatten()[0]) - start
        if not 0 <= place < numbers.numel():
            continue
        linear, local = split_name(tensor)
        expert, linear = split_name(linear)
        _, number = split_name(expert)
        expert_here, row = divmod(place // _COLUMNS, _ROWS)
        cut = Cut(row // max(1, len(values)), _ROWS // max(1, len(values)))
        whole = local == "weight" and number.isdigit()
        if not (whole and torch.equal(values, cut.of(numbers[expert_here]))):
            raise unknown(name)
        parts.append(Part(linear, local_of(name), cut))
        found.add(int(number) - expert_here)
    distinct = tuple(dict.fromkeys(parts))
    if not {part.linear for part in distinct} <= {*linears} or len(found) != 1:
        raise unknown(name)
    if len(parts) != len(numbers) * len(distinct):
        raise unknown(name)
    return ExpertTrace(experts, distinct, found.pop())


class Layouts:
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
            raise unknown(path)
        (readers,) = by_parameter.values()
        count = len(fused.get_parameter(last[0].fused))
        for returns_others in (False, True):
            layout = Layout(count, tuple(readers), last[0], returns_others=returns_others)
            if (type(fused), layout) in self._agreed or agrees(fused, layout):
                self._agreed.add((type(fused), layout))
                return layout
        raise unknown(path)
