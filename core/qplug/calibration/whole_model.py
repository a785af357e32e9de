"""A float model computed as a whole and rewritten anew each time, to learn how to rewrite it.

All tensors of the checkpoint are in memory as they are stored. Those of a decoder block are
rewritten when the block computes, and once more when gradients go back through it: between, only
the hidden states between blocks are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from qplug.api import ModelView, Preparation, WholeModel
from qplug.api.scheme import QuantArgs, Scheme
from qplug.api.tensors import Checkpoint
from qplug.calibration.batches import samples_in_a_batch
from qplug.checkpoint.names import block_of, split_name
from qplug.errors import QplugError
from qplug.model.experts import as_on_disk, name_on_disk
from qplug.model.hollow import build, load_config
from qplug.model.hooks import hooked
from qplug.model.online_rotation import rotate_inputs
from qplug.model.parameters import first_tensor
from qplug.model.rounding_hooks import InputRounding, rounding_inputs
from qplug.model.stand_in import StandIn, refuse_positional
from qplug.numerics.straight_through import (
    fake_quantize,
    range_scale_with_gradients,
    ranges_with_gradients,
    round_inputs,
)

#: Float32 copies of a block that there are at once: rewritten, gradients, and what is between.
_COPIES = 4


@dataclass(frozen=True)
class As:
    """How the model computes: as ``made`` rewrites it, its inputs and its weights rounded."""

    made: Preparation
    inputs: bool = True
    weights: bool = False


class HeldModel(WholeModel):
    """The model of ``source``, on ``device``."""

    def __init__(
        self,
        source: Checkpoint,
        view: ModelView,
        schemes: Mapping[str, Scheme],
        tokens: Tensor,
        *,
        device: torch.device,
        batch_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """``tokens``: int64 ``[samples, length]``, -1 where a sample has ended.

        Raises QplugError if ``device`` has too little memory.
        """
        _refuse_too_large(source, view, device)
        self.device = device
        config = load_config(source.folder, trust_remote_code=trust_remote_code)
        self._model = build(config, source.folder, trust_remote_code=trust_remote_code).eval()
        as_on_disk(self._model, view.blocks, source.tensors)
        self._stored = {name: held.read().to(device) for name, held in source.tensors.items()}
        self._kept = {name for name, _ in self._model.named_buffers()}
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._schemes = schemes
        for name in view.blocks:
            parent, local = split_name(name)
            block = self._model.get_submodule(name)
            held = [n for n in block.state_dict() if f"{name}.{n}" in self._stored]
            setattr(self._model.get_submodule(parent), local, _Rewritten(self, name, block, held))
        outer = [name for name, _ in self._model.named_parameters(remove_duplicate=False)]
        self._outer = {  # by the name on disk
            name if name in self._stored else name_on_disk(self._model, name): name
            for name in outer
        }
        self._batches = tokens.split(batch_size or samples_in_a_batch(tokens.shape[1], device))
        self.count = len(self._batches)
        self.how = As(Preparation({}))

    def loss(self, made: Preparation, batch: int, *, weights: bool = False) -> Tensor:
        tokens = self._batches[batch].to(self.device)
        with torch.no_grad():
            wanted = self.predictions(As(Preparation({}), inputs=False), tokens.clamp(min=0))
        found = self.predictions(As(made, weights=weights), tokens.clamp(min=0))
        divergences = kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        real = tokens >= 0
        mean: Tensor = (divergences * real).sum() / real.sum()
        return mean

    def predictions(self, how: As, tokens: Tensor) -> Tensor:
        """Logarithms of probabilities of each next token: ``[samples, length, vocabulary]``."""
        self.how = how
        there = [name for name in self._outer if name in how.made.rewrites or name in self._stored]
        on_disk = self.values(how, "", there)
        values = {self._outer[name]: value for name, value in on_disk.items()}
        tied = len(there) < len(self._outer)  # the head is the embedding, and stays so
        with self.changed_inputs(self._model, "", how):
            given = {"input_ids": tokens, "use_cache": False}
            found: Any = functional_call(self._model, values, (), given, tie_weights=tied)
        predicted: Tensor = found.logits.float().log_softmax(-1)
        return predicted

    def values(self, how: As, prefix: str, names: list[str]) -> dict[str, Tensor]:
        """The parameters ``names`` of the module at ``prefix``."""
        return {name: self._value(how, prefix + name) for name in names}

    def _value(self, how: As, name: str) -> Tensor:
        if name in how.made.rewrites:
            rewrite = how.made.rewrites[name]
            value = rewrite.make(*(self._stored[source].float() for source in rewrite.sources))
        else:
            value = self._stored[name]
            value = value if name in self._kept else value.float()
        linear = name.removesuffix(".weight")
        if how.weights and linear != name and linear in self._schemes:
            args = self._schemes[linear].weights
            return fake_quantize(
                value, *range_scale_with_gradients(*ranges_with_gradients(value, args), args), args
            )
        return value

    @contextmanager
    def changed_inputs(self, module: nn.Module, prefix: str, how: As) -> Iterator[None]:
        """Within it, linears of ``module`` at ``prefix`` rotate and round what they read."""
        parts = {f"{prefix}{name}" for name, _ in module.named_modules()}
        rotated = [name.removeprefix(prefix) for name in how.made.online if name in parts]
        roundings = {
            name.removeprefix(prefix): InputRounding(scheme.activations)
            for name, scheme in self._schemes.items()
            if how.inputs and name in parts and scheme.activations is not None
        }
        with (
            hooked(rotate_inputs(module, rotated)),  # before they are rounded
            rounding_inputs(module, roundings, _round_through_peaks),
        ):
            yield


class _Rewritten(StandIn):
    """Stands for a block whose parameters, ``held`` of them, are made as it computes."""

    def __init__(self, model: HeldModel, name: str, block: nn.Module, held: list[str]) -> None:
        super().__init__(block)
        self.__dict__["model"] = model
        self._prefix, self._held = f"{name}.", held

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        refuse_positional(args)
        model: HeldModel = self.__dict__["model"]
        compute = partial(self._compute, model, model.how, kwargs)
        if not torch.is_grad_enabled():
            return compute(hidden_states)
        computed: Tensor = checkpoint(compute, hidden_states, use_reentrant=False)
        return computed

    def _compute(
        self, model: HeldModel, how: As, kwargs: dict[str, Any], hidden_states: Tensor
    ) -> Tensor:
        block: nn.Module = self.__dict__["block"]
        values = model.values(how, self._prefix, self._held)
        with model.changed_inputs(block, self._prefix, how):
            return first_tensor(functional_call(block, values, (hidden_states,), kwargs))


def _round_through_peaks(x: Tensor, args: QuantArgs, scale: Tensor | None) -> Tensor:
    return round_inputs(x, args, scale, through_peaks=True)


def _refuse_too_large(source: Checkpoint, view: ModelView, device: torch.device) -> None:
    free = _free_bytes(device)
    if free is None:
        return
    sizes: dict[int | None, int] = {}
    for name, held in source.tensors.items():
        number = block_of(name, view.blocks)
        sizes[number] = sizes.get(number, 0) + math.prod(held.spec.shape)
    stored = sum(held.nbytes for held in source.tensors.values())
    outer = sizes.pop(None, 0)
    need = stored + 4 * _COPIES * (outer + max(sizes.values()))
    if need > free:
        raise QplugError(
            f"learns on the whole model, which takes about {need / 2**30:.1f} GiB, and {device} "
            f"has {free / 2**30:.1f} GiB free; take another device, or an algorithm that does not"
        )


def _free_bytes(device: torch.device) -> int | None:
    """What can still be allocated; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")
    if not told.exists():
        return None
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines() if ":" in line)
    kilobytes = lines.get("MemAvailable")
    return None if kilobytes is None else 1024 * int(kilobytes.split()[0])
