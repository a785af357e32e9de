"""Parameters of modules, set and taken away by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qplug.checkpoint.names import split_name
from qplug.errors import QplugError


def refuse_infinite(tensors: Mapping[str, Tensor]) -> None:
    """Raises QplugError for the first of ``tensors`` that is not finite."""
    extremes = torch.stack(
        [torch.stack(torch.aminmax(value)).float() for value in tensors.values()]
    )
    for name, finite in zip(tensors, torch.isfinite(extremes).all(1).tolist(), strict=True):
        if not finite:
            raise QplugError(f"{name}: has NaN or infinite values")


def fill_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        set_parameter(module, name, value)


def empty_parameters(module: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        set_parameter(module, name, torch.empty(0, device="meta"))


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    path, local = split_name(name)
    part = module.get_submodule(path)
    if local in part._buffers:
        part._buffers[local] = value
    else:
        part._parameters[local] = nn.Parameter(value, requires_grad=False)


def call_block(
    module: nn.Module, values: Mapping[str, Tensor], batch: Tensor, call: Mapping[str, Any]
) -> Tensor:
    """What ``module`` makes of ``batch`` with the parameters ``values``."""
    return first_tensor(functional_call(module, dict(values), (batch,), dict(call)))


def first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states, of what a block gives back."""
    return output if isinstance(output, Tensor) else output[0]
