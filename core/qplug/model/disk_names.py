"""The names of a model's tensors on disk, which differ from the names in memory for some models.

transformers renames tensors, and stacks the experts of a layer, when it loads a checkpoint. Each
name of the checkpoint is sent through the renaming of its loader, which gives the parameter in
memory that the tensor becomes, or becomes a part of. The names of tensors that the checkpoint lacks
come from the conversion to disk, and from the names of the tensors next to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qplug.checkpoint.names import module_of, natural_order, split_name
from qplug.errors import QplugError
from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DiskNames:
    """The names on disk of a model's parameters.

    ``shapes`` has the shape of every tensor that a checkpoint of the model has, by name on disk;
    tensors of which transformers makes parts of a parameter are included where its conversion to
    disk gives the names of the checkpoint. ``of_parameter`` maps the name in memory of each
    parameter that is stored alone, as it is, to its name on disk. ``parts`` has the tensors that
    transformers joins or cuts to make a parameter, by name of the parameter in memory.
    """

    shapes: Mapping[str, tuple[int, ...]]
    of_parameter: Mapping[str, str]
    parts: Mapping[str, tuple[str, ...]]

    def module(self, path: str) -> str | None:
        """Returns the name on disk of the module at ``path`` that has a weight; None if unknown."""
        stored = self.of_parameter.get(f"{path}.weight")
        if stored is None:
            return None
        module, local = split_name(stored)
        return module if local == "weight" else None

    def whole(self, parameter: str) -> str | None:
        """Returns the one tensor on disk that is ``parameter``; None if there are several."""
        parts = self.parts.get(parameter, ())
        return self.of_parameter.get(parameter) or (parts[0] if len(parts) == 1 else None)

    def block(self, path: str) -> str:
        """Returns the name on disk of the block at ``path``.

        Raises QplugError if the tensors of the block have no name in common there.
        """
        inside = {n: d for n, d in self.of_parameter.items() if n.startswith(f"{path}.")}
        found = {
            stored.removesuffix(local)
            for name, stored in inside.items()
            if stored.endswith(local := name.removeprefix(path))
        }
        if len(found) != 1:
            common = module_of(_common_prefix([*inside.values()]))
            found = {common} if common else set()
        if len(found) != 1:
            raise QplugError(
                f"{path}: is a decoder block whose tensors go by other names in the checkpoint, "
                "which qplug cannot assign"
            )
        return found.pop()


def disk_names(model: PreTrainedModel, stored: Iterable[str]) -> DiskNames:
    """Returns the names on disk of the parameters of ``model``, which may be hollow.

    ``stored`` are the names of the tensors of a float checkpoint of the model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    aliases: dict[int, list[str]] = {}  # names of tied parameters
    parameters: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        parameters[name] = parameter
    alone: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for name, target, is_part in _loaded(model, stored):
        if is_part:
            parts.setdefault(target, []).append(name)
        elif target in parameters:
            alone[target] = name
    shapes = {stored_name: tuple(parameters[name].shape) for name, stored_name in alone.items()}
    others = {
        name: parameters[name]
        for names in aliases.values()
        if not any(each in alone for each in names)
        for name in [_best_known(names, alone)]
    }
    with quiet_transformers():
        converted: dict[str, Tensor] = revert_weight_conversion(model, others)
    in_memory = {id(tensor): name for name, tensor in others.items()}
    joined = {part for names in parts.values() for part in names}
    is_old = len(joined & converted.keys()) < len(joined)  # the checkpoint has names of its own
    for name, tensor in converted.items():
        target = in_memory.get(id(tensor), "")
        if target and target not in parts:
            alone[target] = name if name in joined else _moved(model, target, alone, name)
            shapes[alone[target]] = tuple(tensor.shape)
        elif name in joined or not is_old:
            shapes[name] = tuple(tensor.shape)
    for name in others.keys() - alone.keys() - parts.keys():
        if parameters[name].ndim == 3:  # experts in several tensors that the checkpoint lacks
            parts[name] = [each for each in _written(model, name) if each in shapes]
    return DiskNames(shapes, alone, {name: tuple(each) for name, each in parts.items()})


def modules_on_disk(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, nn.Module]:
    """Returns the modules of ``model`` that have a weight, by their names on disk.

    ``stored`` as in ``disk_names``.
    """
    names = disk_names(model, stored)
    return {
        on_disk: module
        for path, module in model.named_modules()
        if (on_disk := names.module(path)) is not None
    }


def tied_name(model: PreTrainedModel, path: str) -> str:
    """Returns the name on disk that the module at ``path`` would have if its weight were stored."""
    from transformers.core_model_loading import revert_weight_conversion

    with quiet_transformers():
        (stored,) = revert_weight_conversion(model, {f"{path}.weight": torch.empty(1, 1)})
    return split_name(stored)[0]


def _loaded(model: PreTrainedModel, stored: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Yields each name of ``stored`` that ``model`` loads, and the name in memory that it goes to.

    The third value says whether the tensor is joined with others, or cut, on the way.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    with quiet_transformers():
        conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    for name in natural_order(stored):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            yield name, target, pattern is not None


def _written(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Returns the tensors that the parameter ``name`` becomes if transformers writes it alone.

    Empty if it cannot.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with quiet_transformers():
            return tuple(revert_weight_conversion(model, {name: model.get_parameter(name)}))
    except Exception:  # a conversion may need more tensors than this one
        return ()


def _moved(model: PreTrainedModel, target: str, alone: Mapping[str, str], otherwise: str) -> str:
    """Returns the name on disk of the parameter ``target``, which the checkpoint lacks.

    It is changed as the names of the parameters next to it are; ``otherwise``, the name that
    transformers would write, if there are none, or if it would write theirs as they are.
    """
    near = max(alone, key=lambda name: len(_common_prefix([name, target])), default=None)
    if near is None:
        return otherwise
    stored = alone[near]
    if _written(model, near) == (stored,):
        return otherwise
    same = len(_common_prefix([near[::-1], stored[::-1]]))
    before, after = near[: len(near) - same], stored[: len(stored) - same]
    if not target.startswith(before) or before == after:
        return otherwise
    return after + target.removeprefix(before)


def _best_known(names: Sequence[str], alone: Mapping[str, str]) -> str:
    """Returns the one of ``names``, of a tied parameter, that is most like those in ``alone``."""
    if len(names) == 1:
        return names[0]
    return max(names, key=lambda n: max((len(_common_prefix([n, a])) for a in alone), default=0))


def _common_prefix(names: Sequence[str]) -> str:
    """Returns the characters with which all ``names`` begin."""
    least, most = min(names, default=""), max(names, default="")
    end = next((n for n, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    return least[:end]
