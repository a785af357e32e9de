"""The whole float model in memory, rewritten as it computes, to learn how to rewrite it.

All tensors of the checkpoint are in memory as they are stored. Those of a decoder block are
rewritten when the block computes, and once more when gradients go back through it; between the two
passes only the hidden states between blocks are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from qplug.calibration.samples import Samples
from qplug.checkpoint.names import block_of, module_of, split_name
from qplug.errors import QplugError
from qplug.machine.host_memory import available_memory
from qplug.machine.session import Session
from qplug.model.block_call import Output
from qplug.model.block_list import decoder_blocks
from qplug.model.block_proxy import BlockProxy
from qplug.model.disk_names import disk_names, tied_name
from qplug.model.hollow import build, load_config
from qplug.model.hooks import hooked
from qplug.model.on_disk import as_on_disk
from qplug.model.online_rotation import rotate_inputs
from qplug.model.rounding_hooks import InputRounding, rounding_inputs
from qplug.numerics.straight_through import (
    fake_quantize,
    range_scale_with_gradients,
    ranges_with_gradients,
    round_inputs,
)

#: Float32 copies of one block alive at once: rewritten weights, gradients, intermediates.
_COPIES = 4


@dataclass(frozen=True)
class Variant:
    """How the model computes: rewritten by ``preparation``, with rounded inputs and weights."""

    preparation: Preparation
    inputs: bool = True
    weights: bool = False


class InMemoryModel(WholeModel):
    """The model of ``source``, on the device of the session."""

    def __init__(
        self,
        source: Checkpoint,
        view: ModelView,
        schemes: Mapping[str, Scheme],
        samples: Samples,
        session: Session,
        *,
        batch_size: int | None = None,
    ) -> None:
        """Raises QplugError if the device has too little memory."""
        device, trusted = session.device, session.trust_remote_code
        _refuse_too_large(source, view, device)
        self.device = device
        config = load_config(source.folder, trust_remote_code=trusted)
        self._model = build(config, source.folder, trust_remote_code=trusted).eval()
        names = disk_names(self._model, source.tensors)
        in_memory = decoder_blocks(self._model, source.folder)
        blocks = as_on_disk(self._model, view.blocks, source.tensors, names, shapes=source.shapes)
        self._stored = {name: tensor.read().to(device) for name, tensor in source.tensors.items()}
        self._buffers = {name for name, _ in self._model.named_buffers()}
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._schemes = schemes
        for (name, block), path in zip(blocks.items(), in_memory, strict=True):
            parent, local = split_name(path)
            parameters = [n for n in block.state_dict() if f"{name}.{n}" in self._stored]
            proxy = _RewrittenBlock(self, name, block, parameters)
            setattr(self._model.get_submodule(parent), local, proxy)
        #: The names in memory of the parameters outside of the blocks, by their names on disk.
        self._outer = {
            names.of_parameter.get(name)
            or f"{tied_name(self._model, module_of(name))}.weight": name
            for name, _ in self._model.named_parameters(remove_duplicate=False)
        }
        self._batches = samples.batches(batch_size or samples_in_a_batch(samples.length, device))
        self.count = len(self._batches)
        self.variant = Variant(Preparation({}))

    def loss(self, preparation: Preparation, batch: int, *, weights: bool = False) -> Tensor:
        samples = self._batches[batch]
        inputs = {n: x.to(self.device) for n, x in samples.inputs(torch.float32).items()}
        with torch.no_grad():
            float_model = Variant(Preparation({}), inputs=False)
            expected = self.predictions(float_model, inputs)
        predicted = self.predictions(Variant(preparation, weights=weights), inputs)
        divergences = kl_div(predicted, expected, reduction="none", log_target=True).sum(-1)
        counted = torch.ones_like(samples.tokens) if samples.counted is None else samples.counted
        counted = counted.to(self.device)
        mean: Tensor = (divergences * counted).sum() / counted.sum().clamp(min=1)
        return mean

    def predictions(self, variant: Variant, inputs: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities of each next token, float32 ``[samples, length, vocabulary]``.

        ``inputs`` are arguments of the model by name.
        """
        self.variant = variant
        rewrites = variant.preparation.rewrites
        names = [name for name in self._outer if name in rewrites or name in self._stored]
        on_disk = self.values(variant, "", names)
        values = {self._outer[name]: value for name, value in on_disk.items()}
        tied = len(names) < len(self._outer)  # the head is the embedding
        with self.changed_inputs(self._model, "", variant):
            call = {**inputs, "use_cache": False}
            output: Any = functional_call(self._model, values, (), call, tie_weights=tied)
        log_probabilities: Tensor = output.logits.float().log_softmax(-1)
        return log_probabilities

    def values(self, variant: Variant, prefix: str, names: list[str]) -> dict[str, Tensor]:
        """The parameters ``names`` of the module whose name with a dot is ``prefix``."""
        return {name: self._value(variant, prefix + name) for name in names}

    def _value(self, variant: Variant, name: str) -> Tensor:
        rewrite = variant.preparation.rewrites.get(name)
        if rewrite is not None:
            value = rewrite.make(*(self._stored[source].float() for source in rewrite.sources))
        else:
            value = self._stored[name]
            value = value if name in self._buffers else value.float()
        linear = name.removesuffix(".weight")
        if variant.weights and linear != name and linear in self._schemes:
            args = self._schemes[linear].weights
            return fake_quantize(
                value, *range_scale_with_gradients(*ranges_with_gradients(value, args), args), args
            )
        return value

    @contextmanager
    def changed_inputs(self, module: nn.Module, prefix: str, variant: Variant) -> Iterator[None]:
        """Within it, linears of ``module`` rotate and round their inputs as ``variant`` says.

        ``prefix``: the name of ``module`` with a dot.
        """
        names = {f"{prefix}{name}" for name, _ in module.named_modules()}
        online = variant.preparation.online
        rotated = [name.removeprefix(prefix) for name in online if name in names]
        roundings = {
            name.removeprefix(prefix): InputRounding(scheme.activations)
            for name, scheme in self._schemes.items()
            if variant.inputs and name in names and scheme.activations is not None
        }
        with (
            hooked(
                rotate_inputs(dict(module.named_modules()), rotated)
            ),  # inputs are rotated first, then rounded
            rounding_inputs(module, roundings, _round_through_peaks),
        ):
            yield


class _RewrittenBlock(BlockProxy):
    """Stands for a block; makes its ``parameters`` each time it computes."""

    def __init__(
        self, model: InMemoryModel, name: str, block: nn.Module, parameters: list[str]
    ) -> None:
        super().__init__(block)
        self.__dict__["model"] = model
        self._prefix, self._names = f"{name}.", parameters

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        model: InMemoryModel = self.__dict__["model"]
        compute = partial(self._compute, model, model.variant, kwargs)
        if not torch.is_grad_enabled():
            return compute(*args)
        return checkpoint(compute, *args, use_reentrant=False)

    def _compute(
        self, model: InMemoryModel, variant: Variant, kwargs: dict[str, Any], *args: Any
    ) -> Output:
        block: nn.Module = self.__dict__["block"]
        values = model.values(variant, self._prefix, self._names)
        with model.changed_inputs(block, self._prefix, variant):
            return functional_call(block, values, args, kwargs)


def _round_through_peaks(x: Tensor, args: QuantArgs, scale: Tensor | None) -> Tensor:
    return round_inputs(x, args, scale, through_peaks=True)


def _refuse_too_large(source: Checkpoint, view: ModelView, device: torch.device) -> None:
    """Raises QplugError if ``device`` has less free memory than an upper estimate of the need."""
    free = _free_bytes(device)
    if free is None:
        return
    sizes: dict[int | None, int] = {}
    for name, tensor in source.tensors.items():
        block = block_of(name, view.blocks)
        sizes[block] = sizes.get(block, 0) + math.prod(tensor.spec.shape)
    stored = sum(tensor.nbytes for tensor in source.tensors.values())
    outer = sizes.pop(None, 0)
    need = stored + 4 * _COPIES * (outer + max(sizes.values()))
    if need > free:
        raise QplugError(
            f"learns on the whole model, which takes about {need / 2**30:.1f} GiB, and {device} "
            f"has {free / 2**30:.1f} GiB free; take another device, or an algorithm that does not"
        )


def _free_bytes(device: torch.device) -> int | None:
    """Free memory in bytes; None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()
