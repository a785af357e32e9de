"""The names of a model's tensors on disk, which differ from the names in memory for some models.

transformers renames modules, and stacks experts, when it loads a checkpoint. Its own conversion to
disk, sent once through a hollow model, says which name on disk belongs to which name in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qplug.checkpoint.names import split_name
from qplug.errors import QplugError
from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DiskNames:
    """The names on disk of a model's parameters.

    ``shapes`` has the shape of every tensor on disk, by name. ``of_parameter`` maps the name in
    memory of each parameter that is stored alone, as it is, to its name on disk.
    """

    shapes: Mapping[str, tuple[int, ...]]
    of_parameter: Mapping[str, str]

    def module(self, path: str) -> str | None:
        """Returns the name on disk of the module at ``path`` that has a weight; None if unknown."""
        stored = self.of_parameter.get(f"{path}.weight")
        if stored is None:
            return None
        module, local = split_name(stored)
        return module if local == "weight" else None

    def block(self, path: str) -> str:
        """Returns the name on disk of the block at ``path``.

        Raises QplugError if the tensors of the block have no name in common there.
        """
        found = {
            stored.removesuffix(local)
            for name, stored in self.of_parameter.items()
            if name.startswith(f"{path}.") and stored.endswith(local := name.removeprefix(path))
        }
        if len(found) != 1:
            raise QplugError(
                f"{path}: is a decoder block whose tensors go by other names in the checkpoint, "
                "which qplug cannot assign"
            )
        return found.pop()


def disk_names(model: PreTrainedModel) -> DiskNames:
    """Returns the names on disk of the parameters of ``model``, which may be hollow."""
    from transformers.core_model_loading import revert_weight_conversion

    parameters: dict[str, Tensor] = dict(model.named_parameters())
    with quiet_transformers():
        stored = revert_weight_conversion(model, parameters)
    in_memory = {id(tensor): name for name, tensor in parameters.items()}
    return DiskNames(
        {name: tuple(tensor.shape) for name, tensor in stored.items()},
        {in_memory[id(tensor)]: name for name, tensor in stored.items() if id(tensor) in in_memory},
    )


def tied_name(model: PreTrainedModel, path: str) -> str:
    """Returns the name on disk that the module at ``path`` would have if its weight were stored."""
    from transformers.core_model_loading import revert_weight_conversion

    with quiet_transformers():
        (stored,) = revert_weight_conversion(model, {f"{path}.weight": torch.empty(1, 1)})
    return split_name(stored)[0]
