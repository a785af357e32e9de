"""Hooks by which the linears of a module read rounded inputs, as they do in an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

from qplug.api.scheme import QuantArgs
from qplug.model.hooks import hooked
from qplug.numerics.activations import fake_quantize_activations

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

#: Rounds ``x: [..., width]`` under a static scale, float32 ``[1]``, or under its own if None.
RoundingFunction: TypeAlias = Callable[[Tensor, QuantArgs, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class InputRounding:
    """How the input of one linear is rounded. ``scale``: float32 ``[1]``, if inputs are static."""

    args: QuantArgs
    scale: Tensor | None = None


def round_inputs_of(
    module: nn.Module,
    roundings: Mapping[str, InputRounding],
    function: RoundingFunction = fake_quantize_activations,
) -> list[RemovableHandle]:
    """Registers hooks that round the inputs of submodules of ``module`` from now on.

    ``roundings``: by path of the submodule. ``function`` does the rounding; the default has no
    gradient.
    """
    return [
        module.get_submodule(path).register_forward_pre_hook(partial(_round, rounding, function))
        for path, rounding in roundings.items()
    ]


@contextmanager
def rounding_inputs(
    module: nn.Module,
    roundings: Mapping[str, InputRounding],
    function: RoundingFunction = fake_quantize_activations,
) -> Iterator[None]:
    """Rounds inputs as ``round_inputs_of`` does, until the end of the ``with`` block."""
    with hooked(round_inputs_of(module, roundings, function)):
        yield


def _round(
    rounding: InputRounding,
    function: RoundingFunction,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
) -> tuple[Tensor]:
    x, scale = inputs[0], rounding.scale
    return (function(x, rounding.args, None if scale is None else scale.to(x.device)),)
