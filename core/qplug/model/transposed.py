"""Linears that transformers keeps transposed, as GPT-2's, become linears like all others.

``Conv1D`` of transformers computes what ``nn.Linear`` does, with a weight ``[in, out]`` in memory
and on disk. Everything in qplug sees ``weight: [out, in]``; only files have the other order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from qplug.api import Checkpoint
from qplug.checkpoint.names import split_name
from qplug.checkpoint.transposed import transposed_tensor
from qplug.model.disk_names import disk_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransposedLinear(nn.Linear):
    """A linear whose ``weight: [out, in]`` files store as ``[in, out]``."""


def with_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Returns ``model``, in which a ``TransposedLinear`` takes the place of each ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D

    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Conv1D)]
    for path, module in found:
        parent, local = split_name(path)
        columns, rows = module.weight.shape  # [in, out]
        linear = TransposedLinear(columns, rows, device="meta")
        linear.weight = nn.Parameter(module.weight.T.contiguous(), requires_grad=False)
        linear.bias = module.bias
        linear.train(module.training)
        model.get_submodule(parent).add_module(local, linear)
    return model


def seen_as_linears(model: PreTrainedModel, checkpoint: Checkpoint) -> Checkpoint:
    """Returns ``checkpoint`` with ``weight: [out, in]`` for the transposed linears of ``model``."""
    names = _transposed(model, checkpoint.tensors) - checkpoint.transposed
    turned = {name: transposed_tensor(checkpoint.tensors[name]) for name in sorted(names)}
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **turned},
        transposed=checkpoint.transposed | names,
    )


def as_published(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors ``state``, by name on disk, as files store them: ``weight: [in, out]``.

    ``model``: without ``Conv1D``, as ``with_linears`` returns it.
    """
    turned = {name: state[name].T.contiguous() for name in _transposed(model, state)}
    return {**state, **turned}


def _transposed(model: PreTrainedModel, stored: Collection[str]) -> frozenset[str]:
    """Returns the names on disk in ``stored`` of weights of ``model`` that are ``[in, out]``."""
    paths = [path for path, module in model.named_modules() if isinstance(module, TransposedLinear)]
    if not paths:
        return frozenset()
    names = disk_names(model, stored).of_parameter
    return frozenset(names[f"{path}.weight"] for path in paths if f"{path}.weight" in names) & {
        *stored
    }
