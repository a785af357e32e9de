"""The part of a model that text alone goes through, where the whole model asks for more."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def part_for(model: nn.Module, decoder: str, inputs: Collection[str]) -> nn.Module:
    """Returns the largest part of ``model`` that has its ``decoder`` and can be called.

    ``decoder``: the path of the module that has the decoder blocks. ``inputs``: the arguments that
    there are, such as ``input_ids``: a model that asks for pictures is passed over for its language
    model if there are none. Returns ``model`` if there is no such part.
    """
    path, (required, _) = "", _arguments(model)
    if required <= {*inputs}:
        return model
    for name in decoder.split("."):
        path = f"{path}.{name}" if path else name
        part = model.get_submodule(path)
        required, taken = _arguments(part)
        if required <= {*inputs} <= taken:
            return part
    return model


def _arguments(part: nn.Module) -> tuple[set[str], set[str]]:
    """The arguments that a call of ``part`` must have, and all that it takes by name."""
    named = {
        name: argument
        for name, argument in inspect.signature(part.forward).parameters.items()
        if argument.kind not in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL)
    }
    required = {name for name, argument in named.items() if argument.default is argument.empty}
    return required, {*named}
