"""Parameters of a block whose elements a checkpoint has in one tensor, in the order of its own.

Some checkpoints join the linears that read one input (a ``Wqkv``), cut a tensor that two modules
share, or turn axes; transformers takes them apart as it loads. Where the elements lie is traced by
sending numbered ones through its conversion to disk. No architecture is named here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import module_of, split_name
from qplug.model.to_disk import converted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Columns of the numbered weight of a linear, whose rows stay whole.
_COLUMNS = 2


@dataclass(frozen=True)
class Joined:
    """A tensor ``name`` on disk, of ``shape``, that has the elements of several parameters.

    ``rows``: int64 ``[out]``, the rows on disk of each parameter, by its name in memory, if all are
    weights or biases of linears. Otherwise None, and ``elements`` has the places of the elements of
    each parameter in the flat tensor, int64 in the shape of the parameter.
    """

    name: str
    shape: tuple[int, ...]
    rows: Mapping[str, Tensor] | None
    elements: Mapping[str, Tensor]


def joined_on_disk(
    model: PreTrainedModel,
    parameters: Sequence[str],
    stored_as: Mapping[str, Sequence[str]],
) -> tuple[Joined, ...] | None:
    """Returns the tensors on disk in which all of ``parameters`` of ``model`` are joined.

    ``stored_as``: the names in the checkpoint, as far as they are known, by parameter. A parameter
    that is stored as it is, or cut in parts that follow one another, has no place in the result.
    None if a tensor has another layout. Raises QplugError if transformers needs more parameters.
    """
    numbers, start = dict[str, Tensor](), 0
    for name in parameters:
        parameter = model.get_parameter(name)
        shape = tuple(parameter.shape)
        if _is_weight(model, name):
            shape = (shape[0], _COLUMNS)
        size = torch.Size(shape).numel()
        numbers[name] = torch.arange(start, start + size).view(shape)
        start += size
    found = []
    for on_disk, places in converted(model, numbers).items():
        flat = places.flatten()
        sources = [name for name in parameters if _has_some(numbers[name], flat)]
        if len(sources) == 1 and _follow(flat):
            continue
        names = {each for source in sources for each in stored_as.get(source, ())}
        if on_disk not in names and len(names) != 1:
            return None
        joined = _joined(
            model, on_disk if on_disk in names else names.pop(), places, numbers, sources
        )
        if joined is None:
            return None
        found.append(joined)
    return tuple(found)


def _joined(
    model: PreTrainedModel,
    name: str,
    places: Tensor,
    numbers: Mapping[str, Tensor],
    sources: Sequence[str],
) -> Joined | None:
    """The tensor ``name``, whose element at each of ``places`` has the number there."""
    first = int(numbers[sources[0]].flatten()[0])
    where = torch.full((max(int(numbers[s].max()) for s in sources) + 1 - first,), -1)
    where[places.flatten() - first] = torch.arange(places.numel())
    elements = {source: where[numbers[source] - first] for source in sources}
    if places.numel() != sum(each.numel() for each in elements.values()):
        return None
    if any(int(each.min()) < 0 for each in elements.values()):
        return None
    linears = all(isinstance(model.get_submodule(module_of(s)), nn.Linear) for s in sources)
    if not linears:
        return Joined(name, tuple(places.shape), None, elements)
    if places.ndim == 1:
        return Joined(name, tuple(places.shape), elements, elements)
    widths = {model.get_parameter(source).shape[1] for source in sources}
    rows = {source: each[:, 0] // _COLUMNS for source, each in elements.items()}
    along = torch.arange(_COLUMNS)
    whole = places.ndim == 2 and places.shape[1] == _COLUMNS and len(widths) == 1
    if not whole or any(
        not torch.equal(elements[s], rows[s][:, None] * _COLUMNS + along) for s in sources
    ):
        return None
    return Joined(name, (len(places), widths.pop()), rows, elements)


def _is_weight(model: PreTrainedModel, name: str) -> bool:
    module, local = split_name(name)
    return local == "weight" and isinstance(model.get_submodule(module), nn.Linear)


def _has_some(numbers: Tensor, flat: Tensor) -> bool:
    """Whether ``flat`` has some of ``numbers``, which follow one another."""
    low, high = int(numbers.flatten()[0]), int(numbers.flatten()[-1])
    return bool(((flat >= low) & (flat <= high)).any())


def _follow(flat: Tensor) -> bool:
    """Whether the numbers ``flat`` follow one another."""
    return torch.equal(flat, torch.arange(int(flat[0]), int(flat[0]) + len(flat)))
