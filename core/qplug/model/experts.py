"""The modules of a model as its checkpoint names them, with linears for every single expert.

transformers fuses the experts of a layer into tensors of three dimensions, and renames modules; on
disk, for engines and for algorithms, each expert has linears of its own. The layout is traced by
sending numbered elements through transformers' own conversion to disk, and the separate experts are
compared with the fused module on random tokens. No architecture is named here.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import local_of, module_of, split_name
from qplug.errors import QplugError
from qplug.model.block_list import decoder_blocks
from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Rows and columns of each expert in the numbered tensor; two fused linears take half of the rows.
_ROWS, _COLUMNS = 4, 3
#: The largest relative difference that another order of summation makes on a few random tokens.
_RTOL = 1e-4


class Experts(nn.Module):
    """The experts of a layer, by number; called like the fused module that it replaces.

    ``readers``: the names of an expert's linears that read tokens. ``last``: the name of its output
    linear. ``rows[e]``: the tokens that expert ``e`` was given in the last pass, int64, ascending.
    """

    def __init__(self, fused: nn.Module, layout: _Layout) -> None:
        super().__init__()
        self.readers, self.last = layout.readers, layout.last
        self.rows: tuple[Tensor, ...] = ()
        self.__dict__["_fused"] = fused  # not registered: the linears have its parameters
        for number in range(layout.count):
            expert = nn.Module()
            for name, part in layout.linears.items():
                expert.add_module(name, _linear(part.of(fused.get_parameter(part.fused), number)))
            self.add_module(str(number), expert)
        for name in [name for name, _ in fused.named_parameters(recurse=False)]:
            fused._parameters[name] = None

    def forward(self, tokens: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """``tokens: [tokens, width]``; ``chosen``, ``shares``: ``[tokens, experts of a token]``."""
        per_token = chosen.shape[-1]
        order = torch.argsort(chosen.flatten(), stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self._modules)).tolist()
        places = order.split(counts)
        self.rows = tuple(place // per_token for place in places)
        outputs = torch.empty(
            len(order), tokens.shape[-1], dtype=tokens.dtype, device=tokens.device
        )
        for expert, place, rows in zip(self.children(), places, self.rows, strict=True):
            if len(rows):
                outputs[place] = self._output(expert, tokens[rows])
        weighted = outputs.unflatten(0, (-1, per_token)) * shares.unsqueeze(-1)
        mixed: Tensor = weighted.sum(1).to(tokens.dtype)
        return mixed

    def _output(self, expert: nn.Module, x: Tensor) -> Tensor:
        fused: Any = self.__dict__["_fused"]
        inner = torch.cat([expert.get_submodule(name)(x) for name in self.readers], -1)
        inner = fused._apply_gate(inner) if fused.has_gate else fused.act_fn(inner)
        output: Tensor = expert.get_submodule(self.last)(inner)
        return output


def rows_of(block: nn.Module, path: str) -> Tensor | None:
    """The tokens that the linear at ``path`` reads in the current pass, int64; None if all."""
    parent, number = split_name(module_of(path))
    experts = block.get_submodule(parent)
    return experts.rows[int(number)] if isinstance(experts, Experts) else None


@torch.no_grad()
def as_on_disk(model: PreTrainedModel, blocks: Sequence[str], stored: Container[str]) -> None:
    """Give the parameters in ``blocks`` of ``model`` the names and shapes that they have on disk.

    ``stored``: the names of the checkpoint's tensors. The outputs of ``model`` stay the same; the
    weights of experts are views of its own tensors. Raises QplugError for an unknown layout.
    """
    name_blocks(model, blocks)
    verified: set[tuple[type, _Layout]] = set()
    for block in blocks:
        module = model.get_submodule(block)
        missing = [
            name
            for local, _ in module.named_parameters()
            if (name := f"{block}.{local}") not in stored
        ]
        fused: dict[str, list[_Part]] = {}
        paths: dict[str, str] = {}  # paths on disk, by paths in memory
        for name in missing:
            path, local, parts = _trace(model, name)
            paths[module_of(name)] = path
            if parts:
                fused.setdefault(module_of(name), []).extend(parts)
            elif local != local_of(name):
                raise _unknown(name)
        for path, parts in fused.items():
            layout = _layout(path, parts, model.get_submodule(path))
            if (type(model.get_submodule(path)), layout) not in verified:
                _verify(path, model.get_submodule(path), layout)
                verified.add((type(model.get_submodule(path)), layout))
            parent, local = split_name(path)
            experts = Experts(model.get_submodule(path), layout)
            model.get_submodule(parent).add_module(local, experts)
        for path, on_disk in sorted(paths.items(), key=lambda pair: -pair[0].count(".")):
            _rename(model, path, on_disk)
        for local, _ in module.named_parameters():
            if f"{block}.{local}" not in stored:
                raise _unknown(f"{block}.{local}")


def name_blocks(model: PreTrainedModel, blocks: Sequence[str]) -> None:
    """Register the decoder blocks of ``model`` under their names on disk, ``blocks``, too."""
    in_memory = decoder_blocks(model, Path(str(model.config.name_or_path)))
    for before, after in zip(in_memory, blocks, strict=False):
        _rename(model, before, after)


def name_on_disk(model: PreTrainedModel, parameter: str) -> str:
    """The name in checkpoints of a parameter outside of the blocks."""
    path, local, _ = _trace(model, parameter)
    return f"{path}.{local}"


# --- layouts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A linear of every expert: rows ``start`` to ``stop`` of ``_ROWS``, in parameter ``fused``."""

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
    """The path on disk of the module with parameter ``name``, the local name there, and parts.

    For fused experts: the path of the experts, an empty name, and the linears in the parameter.
    """
    from transformers.core_model_loading import revert_weight_conversion

    real = model.get_parameter(name).shape
    shape = (real[0], _ROWS, _COLUMNS) if len(real) == 3 else (2,) * len(real)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    try:
        with quiet_transformers():
            on_disk: dict[str, Tensor] = revert_weight_conversion(model, {name: numbers})
    except Exception as error:  # a conversion may need more tensors than this one
        raise _unknown(name) from error
    if len(on_disk) == 1:
        path, local = split_name(next(iter(on_disk)))
        return path, local, []
    parts: dict[str, list[_Part]] = {}
    for tensor, values in on_disk.items():
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
    """The layout of the experts at ``path``. Raises QplugError if their linears are unknown."""
    by_parameter: dict[str, list[_Part]] = {}
    for part in sorted(parts, key=lambda part: part.start):
        by_parameter.setdefault(part.fused, []).append(part)
    # transformers uses this name for the output linear of all fused experts.
    last = by_parameter.pop("down_proj", [])
    if len(last) != 1 or len(by_parameter) != 1:
        raise _unknown(path)
    (readers,) = by_parameter.values()
    count = fused.get_parameter(last[0].fused).shape[0]
    names = tuple(part.linear for part in readers)
    return _Layout(count, names, last[0].linear, (*readers, last[0]))


def _verify(path: str, fused: nn.Module, layout: _Layout) -> None:
    """Raises QplugError if separate experts and ``fused``, made small, have different outputs."""
    generator = torch.Generator().manual_seed(0)
    width, inner, tokens, per_token = 8, 4, 16, min(2, layout.count)
    shapes = {
        layout.parts[0].fused: (layout.count, len(layout.readers) * inner, width),
        layout.parts[-1].fused: (layout.count, width, inner),
    }
    parameters = dict(fused.named_parameters(recurse=False))
    x = torch.randn(tokens, width, generator=generator)
    shares, chosen = torch.rand(tokens, layout.count, generator=generator).topk(per_token)
    try:
        for name in parameters:
            value = torch.randn(shapes[name], generator=generator)
            fused._parameters[name] = nn.Parameter(value, requires_grad=False)
        expected = fused(x, chosen, shares)
        output = Experts(fused, layout)(x, chosen, shares)
    except Exception as error:  # the module has other arguments, or more parts
        raise _unknown(path) from error
    finally:
        fused._parameters.update(parameters)
    if not (output - expected).norm() <= _RTOL * expected.norm():
        raise _unknown(path)


def _linear(weight: Tensor) -> nn.Linear:
    """A linear that uses the memory of ``weight: [out, in]``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _rename(model: nn.Module, path: str, on_disk: str) -> None:
    """Register the modules along ``path`` under their names ``on_disk`` too."""
    old, new = path.split("."), on_disk.split(".")
    if len(old) != len(new):
        raise _unknown(path)
    for depth, (before, after) in enumerate(zip(old, new, strict=True)):
        parent = model.get_submodule(".".join(new[:depth]))
        if after in parent._modules:
            continue
        if before not in parent._modules:
            raise _unknown(path)
        parent.__dict__[before] = parent._modules[before]  # the model's code uses the old name
        renamed = [(after if name == before else name, m) for name, m in parent._modules.items()]
        parent._modules.clear()
        parent._modules.update(renamed)


def _unknown(name: str) -> QplugError:
    return QplugError(
        f"{name}: is stored in parts that qplug cannot put together, so algorithms that need "
        "calibration data cannot take this architecture; use one that needs none, such as rtn"
    )
