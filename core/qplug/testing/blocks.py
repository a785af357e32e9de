"""A decoder block of a few thousand weights with statistics, as algorithms receive blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qplug.api import Block, Linear
from qplug.api.scheme import Scheme
from qplug.calibration.hidden_states import HiddenStates
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.reconstruction import Data, LiveReconstruction
from qplug.calibration.statistics import Statistics
from qplug.machine.processes import ALONE
from qplug.model.block_call import BlockCall
from qplug.model.hooks import hooked
from qplug.model.input_groups import GroupPaths, Producer

_INNER = 48
_CPU = torch.device("cpu")


class _TinyMLP(nn.Module):
    """A norm, two linears that read it, and a linear that reads their product; no residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, _INNER, bias=False)
        self.up = nn.Linear(width, _INNER, bias=False)
        self.down = nn.Linear(_INNER, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        down: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return down


def tiny_block(
    scheme: Scheme,
    *,
    width: int = 64,
    tokens: int = 256,
    movable: bool = True,
    dead_channel: bool = False,
    seed: int = 0,
) -> LiveBlock:
    """Returns a block of three linears in ``scheme``, with statistics of ``tokens`` tokens.

    ``gate`` and ``up`` read a norm, ``down`` reads ``silu(gate) * up``. Their float32 weights are
    ``[48, width]``, ``[48, width]`` and ``[width, 48]``. A few channels of the input are far larger
    than the others, as in real models. If ``movable``, both inputs have a producer that algorithms
    can move scale into. With ``dead_channel`` channel 3 of the block's input is always zero. With
    0 ``tokens`` no token reached the block.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x[:, :: max(1, width // 4)] *= 10
    if dead_channel:
        x[:, 3] = 0
    module = _TinyMLP(width)
    weights = {"norm.weight": torch.ones(width)}
    for name in ("gate", "up", "down"):
        shape = module.get_parameter(f"{name}.weight").shape
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    first = Producer("norm", "norm", torch.arange(width)) if movable else None
    second = Producer("rows", "up", torch.arange(_INNER)) if movable else None
    structure = (GroupPaths(("gate", "up"), first, "gate"), GroupPaths(("down",), second, "down"))
    observe = partial(_observe, module, x)
    block = LiveBlock(
        "block",
        structure,
        observe(weights, weights, ()),
        weights,
        {f"block.{name}": scheme for name in ("gate", "up", "down")},
        dict.fromkeys(weights, "float32"),
        observe,
    )
    if tokens:
        hidden, targets = HiddenStates(_CPU), HiddenStates(_CPU)
        hidden.append(x[None])
        with torch.no_grad():
            targets.append(functional_call(module, weights, x[None]))
        data = Data(hidden, targets, [BlockCall.of((x[None],), {})], [None], [tokens])
        block.reconstruction = LiveReconstruction(block, module, data, _CPU, ALONE)
    return block


@torch.no_grad()
def _observe(
    module: nn.Module,
    x: Tensor,
    values: Mapping[str, Tensor],
    float_values: Mapping[str, Tensor],
    rounded: Sequence[str],
) -> dict[str, Statistics]:
    """Returns statistics of the inputs of ``gate`` and ``down``, with their drift.

    ``values`` are the block's parameters, ``float_values`` those of the float block. Inputs are not
    rounded, whatever is in ``rounded``.
    """
    inputs = [_inputs(module, parameters, x) for parameters in (values, float_values)]
    statistics = {}
    for name, computed, in_float in zip(("gate", "down"), *inputs, strict=True):
        width = computed.shape[1]
        statistics[name] = Statistics(width, _CPU, 128, by_window=True, with_drift=True)
        if len(computed):
            statistics[name].observe_windows(computed, 128, len(computed), float_x=in_float)
    return statistics


def _inputs(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """Returns the inputs of ``gate`` and ``down``, ``[tokens, channels]``, for the input ``x``."""
    inputs: list[Tensor] = []
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments: inputs.append(arguments[0])
        )
        for name in ("gate", "down")
    ]
    with hooked(handles):
        functional_call(module, {n: p for n, p in parameters.items() if "input_scale" not in n}, x)
    return inputs


def tiny_linear(
    scheme: Scheme, *, rows: int = 48, width: int = 64, dtype: str = "float32"
) -> Block:
    """Returns a block with one random weight ``[rows, width]`` in ``dtype``, without statistics.

    This is what an algorithm receives in a step of a data-free run.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator).to(getattr(torch, dtype))
    return Block("linear", (Linear("linear", weight, scheme.weights, scheme.activations),))
