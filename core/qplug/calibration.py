"""Walk a model block by block on calibration tokens: one block in memory, inputs caught once.

What the model computes before its first block (embeddings, masks, rotary tables) is run once, with
every block replaced by a recorder of what it is called with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qplug.api import ModelView
from qplug.checkpoint import Checkpoint
from qplug.errors import QplugError
from qplug.live_block import LiveBlock
from qplug.numerics import fake_quantize_activations
from qplug.scheme import QuantArgs, Scheme
from qplug.skeleton import build, load_config
from qplug.statistics import Statistics
from qplug.structure import Group, find_groups

#: Tokens in one forward pass through a block.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
#: Tokens of each group that are kept as they are.
_SAMPLE = 2048
#: Tokens on which the structure of a block is found.
_PROBE = 16


class Walk:
    """Calibration tokens on their way through the blocks of a model.

    ``enter`` reads a block and gathers its statistics, ``leave`` sends the tokens through what was
    made of it; ``replay`` does the latter alone, for a block that an earlier run has finished.
    """

    def __init__(
        self,
        source: Checkpoint,
        view: ModelView,
        schemes: Mapping[str, Scheme],
        tokens: Tensor,
        *,
        device: torch.device,
        propagate: str = "quantized",
        trust_remote_code: bool = False,
    ) -> None:
        """``tokens``: int64 ``[samples, length]``."""
        self._source, self._view, self._schemes = source, view, schemes
        self._device, self._propagate = device, propagate
        self._dtype = _passing_dtype(device, getattr(torch, view.dtype))
        config = load_config(source.folder, trust_remote_code=trust_remote_code)
        self._model = build(config, source.folder, trust_remote_code=trust_remote_code).eval()
        self._blocks = {name: self._model.get_submodule(name) for name in view.blocks}
        for name, block in self._blocks.items():
            for local, _ in block.named_parameters():
                if f"{name}.{local}" not in source.tensors:
                    raise QplugError(
                        f"{name}.{local}: is stored in parts, as experts are; algorithms that "
                        "need calibration data cannot take them yet"
                    )
        self._structures: dict[tuple[Any, ...], tuple[Group, ...]] = {}
        self._hidden, self._calls = self._catch(tokens)

    # --- before the first block ------------------------------------------------------------------

    @torch.no_grad()
    def _catch(self, tokens: Tensor) -> tuple[list[Tensor], dict[str, list[dict[str, Any]]]]:
        """The hidden states that enter block 0, batch by batch, and how each block is called."""
        outer = [
            name
            for name, _ in self._model.base_model.named_parameters(
                prefix=self._model.base_model_prefix
            )
            if not any(name.startswith(block + ".") for block in self._view.blocks)
        ]
        held = [name for name in outer if name in self._source.tensors]
        self._fill(self._model, {name: self._read(name) for name in held})
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self._device)
        recorders = {name: _Recorder(block) for name, block in self._blocks.items()}
        parent = self._model.get_submodule(self._view.blocks[0].rpartition(".")[0])
        assert isinstance(parent, nn.ModuleList)
        size = max(1, _BATCH_TOKENS[self._device.type] // tokens.shape[1])
        hidden = []
        for index, recorder in enumerate(recorders.values()):
            parent[index] = recorder
        try:
            for batch in tokens.split(size):
                self._model.base_model(input_ids=batch.to(self._device), use_cache=False)
                hidden.append(recorders[self._view.blocks[0]].hidden)
        finally:
            for index, block in enumerate(self._blocks.values()):
                parent[index] = block
            for name in outer:
                _set(self._model, name, torch.empty(0, device="meta"))
        return hidden, {name: recorder.calls for name, recorder in recorders.items()}

    # --- a block ---------------------------------------------------------------------------------

    @torch.no_grad()
    def enter(self, name: str) -> LiveBlock:
        """Read block ``name`` and gather the statistics of what its linears read."""
        module = self._blocks[name]
        weights = {
            local: self._read(f"{name}.{local}").to(self._device)
            for local, _ in module.named_parameters()
        }
        self._fill(module, weights)
        structure = self._structure(name, module, weights)
        statistics = self._observe(name, module, structure)
        _release(module)  # algorithms have masters of their own; ``leave`` fills it again
        return LiveBlock(name, structure, statistics, weights, self._schemes)

    def _structure(
        self, name: str, module: nn.Module, weights: Mapping[str, Tensor]
    ) -> tuple[Group, ...]:
        """Found once for all blocks that are alike, in float32, on random weights and tokens.

        Not on the block's own: where those are zero, or small beside the residual, a wrong answer
        would look right, and a run that goes on at a later block could find another.
        """
        kinds = tuple(sorted({str(type(part)) for part in module.modules()}))
        key = (*kinds, *((local, tuple(weight.shape)) for local, weight in weights.items()))
        if key not in self._structures:
            module.float()
            generator = torch.Generator(self._device).manual_seed(0)
            draw = partial(torch.rand, generator=generator, device=self._device)
            for local, weight in weights.items():
                values = draw(weight.shape)  # norms stay away from zero, matrices keep variance
                spread = (12 / weight.shape[-1]) ** 0.5
                _set(module, local, values + 0.5 if weight.ndim == 1 else (values - 0.5) * spread)
            samples = self._hidden[0]
            probe = draw(1, min(_PROBE, samples.shape[1]), samples.shape[2]) - 0.5
            call = _shortened(self._calls[name][0], _PROBE, torch.float32)
            self._structures[key] = find_groups(module, lambda: _tensor(module(probe, **call)))
            module.to(self._dtype)
            self._fill(module, weights)
        return self._structures[key]

    def _observe(
        self, name: str, module: nn.Module, structure: tuple[Group, ...]
    ) -> dict[str, Statistics]:
        """Statistics by the first linear of each group. In passing, what leaves the float block."""
        statistics = {}
        handles = []
        keep = self._propagate == "float"
        share = -(-_SAMPLE // len(self._hidden))
        for group in structure:
            first = group.linears[0]
            linear = module.get_submodule(first)
            assert isinstance(linear, nn.Linear)
            statistics[first] = Statistics(linear.in_features, self._device, _SAMPLE)
            observe = partial(_observe_input, statistics[first], share)
            handles.append(linear.register_forward_pre_hook(observe))
        if not keep and structure:
            last = module.get_submodule(structure[-1].linears[0])
            handles.append(last.register_forward_pre_hook(_stop))
        try:
            self._forward(name, module, keep=keep)
        finally:
            for handle in handles:
                handle.remove()
        return statistics

    @torch.no_grad()
    def leave(self, name: str, served: Mapping[str, Tensor]) -> None:
        """Send the tokens through the block with the parameters ``served``, and free it.

        ``served``: every parameter by its name within the block, with the value an engine will use.
        """
        module = self._blocks[name]
        parameters = [local for local, _ in module.named_parameters()]
        if self._propagate == "quantized" and name != self._view.blocks[-1]:
            self._fill(module, {local: served[local] for local in parameters})
            with self._rounding_inputs(name, module):
                self._forward(name, module, keep=True)
        _release(module)
        self._calls.pop(name)

    @torch.no_grad()
    def replay(self, name: str, served: Mapping[str, Tensor]) -> None:
        """``leave`` for a block that was finished by an earlier run."""
        if self._propagate == "float":
            module = self._blocks[name]
            self._fill(
                module,
                {n: self._source.read(f"{name}.{n}") for n, _ in module.named_parameters()},
            )
            self._forward(name, module, keep=True)
        self.leave(name, served)

    def _forward(self, name: str, module: nn.Module, *, keep: bool) -> None:
        """Run the block on every batch; ``keep`` puts the results in the place of the inputs."""
        for index, call in enumerate(self._calls[name]):
            with suppress(_SeenEnough):
                after = _tensor(module(self._hidden[index], **call))
                if keep:
                    self._hidden[index] = after

    @contextmanager
    def _rounding_inputs(self, name: str, module: nn.Module) -> Iterator[None]:
        handles = []
        for local, part in module.named_modules():
            scheme = self._schemes.get(f"{name}.{local}")
            if scheme is not None and scheme.activations is not None:
                hook = partial(_round_input, scheme.activations)
                handles.append(part.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _read(self, name: str) -> Tensor:
        """A tensor of the model. Raises QplugError if it is not finite."""
        value = self._source.read(name)
        if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(value)):
            raise QplugError(f"{name}: has NaN or infinite values")
        return value

    def _fill(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            _set(module, name, value.to(self._device, self._dtype))


def _passing_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype of forward passes: the checkpoint's where the device multiplies it fast.

    GPUs do; CPUs that have instructions for bfloat16 do, twice as fast as float32. Others would
    emulate it, which is slower than float32.
    """
    if device.type != "cpu" or (stored == torch.bfloat16 and _multiplies_bfloat16()):
        return stored
    return torch.float32


def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _SeenEnough(Exception):
    """Ends a forward pass whose result nobody wants, once all inputs have been observed."""


def _stop(module: nn.Module, inputs: tuple[Tensor]) -> None:
    raise _SeenEnough


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, local = name.rpartition(".")
    module.get_submodule(path)._parameters[local] = nn.Parameter(value, requires_grad=False)


def _release(module: nn.Module) -> None:
    """Give the memory of its parameters back."""
    for name in [name for name, _ in module.named_parameters()]:
        _set(module, name, torch.empty(0, device="meta"))


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _observe_input(
    statistics: Statistics, share: int, module: nn.Module, inputs: tuple[Tensor]
) -> None:
    statistics.observe(inputs[0].flatten(0, -2), share)


def _round_input(args: QuantArgs, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (fake_quantize_activations(inputs[0], args),)


def _shortened(call: Mapping[str, Any], length: int, dtype: torch.dtype) -> dict[str, Any]:
    """A block's arguments for the first ``length`` tokens of the first sample."""
    return {name: _shorten(value, length, dtype) for name, value in call.items()}


def _shorten(value: Any, length: int, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):  # cos and sin: [samples, tokens, head size]
        return tuple(part[:1, :length].to(dtype) for part in value)
    if isinstance(value, Tensor) and value.ndim == 4:  # a mask: [samples, heads, tokens, tokens]
        return value[:1, :, :length, :length]
    if isinstance(value, Tensor) and value.ndim == 2:  # positions: [samples, tokens]
        return value[:1, :length]
    return value


class _Recorder(nn.Module):
    """Stands for a block: notes how it is called, and lets the hidden states through."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not registered: its parameters are no part of this
        self.calls: list[dict[str, Any]] = []
        self.hidden = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise QplugError("this architecture's blocks take arguments that qplug cannot follow")
        self.hidden = hidden_states
        self.calls.append(kwargs)
        return hidden_states
