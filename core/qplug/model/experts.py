"""The modules of a model as its checkpoint names them: every expert on its own.

transformers fuses the experts of a layer into tensors of three dimensions, and renames modules; on
disk, for engines and for algorithms, each expert has linears of its own. What stands where is found
by sending numbers through transformers' own way back to disk, and what the experts compute is
compared with what the fused module does: no architecture is named here.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import local_of, module_of, split_name
from qplug.errors import QplugError
from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Rows and columns of each expert in the tensor of numbers. Two linears have half of the rows each.
_ROWS, _COLUMNS = 4, 3
#: What another order of sums may change on a few random tokens.
_RTOL = 1e-4


class Experts(nn.Module):
    """The experts of a layer, by number; called as the fused module that it stands for.

    ``readers`` are the names of an expert's linears that read tokens, ``last`` that of the one that
    reads what they make. ``rows[e]``: the tokens that expert ``e`` was given in the last pass, in
    order, int64.
    """

    def __init__(self, fused: nn.Module, layout: _Layout) -> None:
        super().__init__()
        self.readers, self.last = layout.readers, layout.last
        self.rows: tuple[Tensor, ...] = ()
        self.__dict__["_fused"] = fused  # not registered: its parameters are those of the linears
        for number in range(layout.count):
            expert = nn.Module()
            for name, part in layout.linears.items():
                expert.add_module(name, _linear(part.of(fused.get_parameter(part.fused), number)))
            self.add_module(str(number), expert)
        for name in [name for name, _ in fused.named_parameters(recurse=False)]:
            fused._parameters[name] = None

    def forward(self, tokens: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """``tokens: [tokens, width]``; ``chosen``, ``shares``: ``[tokens, experts of each]``."""
        each = chosen.shape[-1]
        order = torch.argsort(chosen.flatten(), stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self._modules)).tolist()
        places = order.split(counts)
        self.rows = tuple(place // each for place in places)
        made = torch.empty(len(order), tokens.shape[-1], dtype=tokens.dtype, device=tokens.device)
        for expert, place, rows in zip(self.children(), places, self.rows, strict=True):
            if len(rows):
                made[place] = self._computed(expert, tokens[rows])
        weighted = made.unflatten(0, (-1, each)) * shares.unsqueeze(-1)
        mixed: Tensor = weighted.sum(1).to(tokens.dtype)
        return mixed

    def _computed(self, expert: nn.Module, x: Tensor) -> Tensor:
        fused: Any = self.__dict__["_fused"]
        made = torch.cat([expert.get_submodule(name)(x) for name in self.readers], -1)
        made = fused._apply_gate(made) if fused.has_gate else fused.act_fn(made)
        left: Tensor = expert.get_submodule(self.last)(made)
        return left


def rows_of(block: nn.Module, path: str) -> Tensor | None:
    """The tokens that the linear at ``path`` is being given, int64; None if it is given all."""
    parent, number = split_name(module_of(path))
    experts = block.get_submodule(parent)
    return experts.rows[int(number)] if isinstance(experts, Experts) else None


@torch.no_grad()
def as_on_disk(model: PreTrainedModel, blocks: Sequence[str], stored: Container[str]) -> None:
    """Give the parameters in ``blocks`` of ``model`` the names and shapes that they have on disk.

    ``stored``: the names of the tensors of the checkpoint. What ``model`` computes stays the same;
    linears of experts are views of its own tensors. Raises QplugError where that cannot be done.
    """
    tried: set[tuple[type, _Layout]] = set()
    for block in blocks:
        module = model.get_submodule(block)
        missing = [
            name
            for local, _ in module.named_parameters()
            if (name := f"{block}.{local}") not in stored
        ]
        fused: dict[str, list[_Part]] = {}
        paths: dict[str, str] = {}  # on disk, by that in memory
        for name in missing:
            path, local, parts = _trace(model, name)
            paths[module_of(name)] = path
            if parts:
                fused.setdefault(module_of(name), []).extend(parts)
            elif local != local_of(name):
                raise _unknown(name)
        for path, parts in fused.items():
            layout = _layout(path, parts, model.get_submodule(path))
            if (type(model.get_submodule(path)), layout) not in tried:
                _try(path, model.get_submodule(path), layout)
                tried.add((type(model.get_submodule(path)), layout))
            parent, local = split_name(path)
            experts = Experts(model.get_submodule(path), layout)
            model.get_submodule(parent).add_module(local, experts)
        for path, on_disk in sorted(paths.items(), key=lambda pair: -pair[0].count(".")):
            _rename(model, path, on_disk)
        for local, _ in module.named_parameters():
            if f"{block}.{local}" not in stored:
                raise _unknown(f"{block}.{local}")


def name_on_disk(model: PreTrainedModel, parameter: str) -> str:
    """What a parameter that stands outside of blocks is called in checkpoints."""
    path, local, _ = _trace(model, parameter)
    return f"{path}.{local}"


# --- what stands where ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A linear of each expert: rows ``start`` to ``stop``, of ``_ROWS``, of parameter ``fused``."""

    linear: str
    fused: str
    start: int
    stop: int

    def of(self, parameter: Tensor, number: int) -> Tensor:
        """The weight of expert ``number``, ``[out, in]``, in ``parameter: [experts, rows, in]``."""
        rows = parameter.shape[1]
        return parameter[number, self.start * rows // _ROWS : self.stop * rows // _ROWS]


@dataclass(frozen=True)
class _Layout:
    """The linears of the experts of one layer: ``readers`` read tokens, in order of their rows."""

    count: int
    readers: tuple[str, ...]
    last: str
    parts: tuple[_Part, ...]

    @property
    def linears(self) -> dict[str, _Part]:
        return {part.linear: part for part in self.parts}


def _trace(model: PreTrainedModel, name: str) -> tuple[str, str, list[_Part]]:
    """The path on disk of the module that has parameter ``name``, and the parameter's name there.

    Of fused experts that is the path of the experts; then with the linears that it holds.
    """
    from transformers.core_model_loading import revert_weight_conversion

    held = model.get_parameter(name).shape
    shape = (held[0], _ROWS, _COLUMNS) if len(held) == 3 else (2,) * len(held)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    try:
        with quiet_transformers():
            found: dict[str, Tensor] = revert_weight_conversion(model, {name: numbers})
    except Exception as error:  # a conversion that wants to see more than this tensor
        raise _unknown(name) from error
    if len(found) == 1:
        path, local = split_name(next(iter(found)))
        return path, local, []
    parts: dict[str, list[_Part]] = {}
    for tensor, values in found.items():
        linear, local = split_name(tensor)
        expert, linear = split_name(linear)
        path, number = split_name(expert)
        start = int(values.flatten()[0]) // _COLUMNS % _ROWS
        part = _Part(linear, local_of(name), start, start + len(values))
        whole = len(shape) == 3 and local == "weight" and number.isdigit()
        if not (whole and torch.equal(values, part.of(numbers, int(number)))):
            raise _unknown(name)
        parts.setdefault(path, []).append(part)
    if len(parts) != 1:
        raise _unknown(name)
    ((path, all_parts),) = parts.items()
    distinct = list(dict.fromkeys(all_parts))
    if len(all_parts) != shape[0] * len(distinct):
        raise _unknown(name)
    return path, "", distinct


def _layout(path: str, parts: list[_Part], fused: nn.Module) -> _Layout:
    """Raises QplugError if the experts have other linears than those that transformers fuses."""
    by_parameter: dict[str, list[_Part]] = {}
    for part in sorted(parts, key=lambda part: part.start):
        by_parameter.setdefault(part.fused, []).append(part)
    # transformers calls them so wherever it fuses experts.
    last = by_parameter.pop("down_proj", [])
    if len(last) != 1 or len(by_parameter) != 1:
        raise _unknown(path)
    (readers,) = by_parameter.values()
    count = fused.get_parameter(last[0].fused).shape[0]
    names = tuple(part.linear for part in readers)
    return _Layout(count, names, last[0].linear, (*readers, last[0]))


def _try(path: str, fused: nn.Module, layout: _Layout) -> None:
    """Raises QplugError if experts of ``layout`` compute other than ``fused``, both made small."""
    generator = torch.Generator().manual_seed(0)
    width, inner, tokens, each = 8, 4, 16, min(2, layout.count)
    shapes = {
        layout.parts[0].fused: (layout.count, len(layout.readers) * inner, width),
        layout.parts[-1].fused: (layout.count, width, inner),
    }
    held = dict(fused.named_parameters(recurse=False))
    x = torch.randn(tokens, width, generator=generator)
    shares, chosen = torch.rand(tokens, layout.count, generator=generator).topk(each)
    try:
        for name in held:
            value = torch.randn(shapes[name], generator=generator)
            fused._parameters[name] = nn.Parameter(value, requires_grad=False)
        wanted = fused(x, chosen, shares)
        found = Experts(fused, layout)(x, chosen, shares)
    except Exception as error:  # a module that is called otherwise, or has more in it
        raise _unknown(path) from error
    finally:
        fused._parameters.update(held)
    if not (found - wanted).norm() <= _RTOL * wanted.norm():
        raise _unknown(path)


def _linear(weight: Tensor) -> nn.Linear:
    """A linear with ``weight: [out, in]`` for its own."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _rename(model: nn.Module, path: str, on_disk: str) -> None:
    """Register the modules along ``path`` by their names ``on_disk``; both names lead to them."""
    old, new = path.split("."), on_disk.split(".")
    if len(old) != len(new):
        raise _unknown(path)
    for depth, (before, after) in enumerate(zip(old, new, strict=True)):
        parent = model.get_submodule(".".join(new[:depth]))
        if after in parent._modules:
            continue
        if before not in parent._modules:
            raise _unknown(path)
        parent.__dict__[before] = parent._modules[before]  # as the code of the model calls it
        renamed = [(after if name == before else name, m) for name, m in parent._modules.items()]
        parent._modules.clear()
        parent._modules.update(renamed)


def _unknown(name: str) -> QplugError:
    return QplugError(
        f"{name}: is stored in parts that qplug cannot put together; algorithms that need "
        "calibration data cannot take this architecture yet"
    )
