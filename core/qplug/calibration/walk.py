"""Walk a model block by block on calibration tokens: one block in memory, inputs caught once.

What the model computes before its first block (embeddings, masks, rotary tables) is run once, with
every block replaced by a recorder of what it is called with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qplug.api import ModelView
from qplug.api.scheme import Scheme
from qplug.api.tensors import Checkpoint
from qplug.calibration.batches import passing_dtype, real_tokens, samples_in_a_batch
from qplug.calibration.block_reader import BlockReader
from qplug.calibration.hidden_states import HiddenStates
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.observation import Observation, Shares
from qplug.calibration.reconstruction import Data, LiveReconstruction
from qplug.calibration.recorder import Recorder, shortened
from qplug.calibration.statistics import Statistics
from qplug.checkpoint.names import block_of, module_of, within
from qplug.errors import QplugError
from qplug.machine.processes import ALONE, Processes
from qplug.machine.stopwatch import Stopwatch
from qplug.model.experts import as_on_disk
from qplug.model.hollow import build, load_config
from qplug.model.input_groups import Group, find_groups
from qplug.model.kv_cache import SCALES, KVCache, ObservedCache, RoundedCache
from qplug.model.online_rotation import rotate_inputs
from qplug.model.parameters import (
    call_block,
    empty_parameters,
    fill_parameters,
    first_tensor,
    refuse_infinite,
    set_parameter,
)
from qplug.model.rounding_hooks import InputRounding, rounding_inputs

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
        batch_size: int | None = None,
        with_drift: bool = False,
        with_targets: bool = False,
        online: Sequence[str] = (),
        cache: KVCache | None = None,
        trust_remote_code: bool = False,
        processes: Processes = ALONE,
        clock: Stopwatch | None = None,
    ) -> None:
        """``tokens``: int64 ``[samples, length]``, -1 where a sample has ended.

        Each of ``processes`` takes a part of them. ``with_drift`` gathers ``InputGroup.drift``,
        ``with_targets`` gives blocks their ``reconstruction``.
        Inputs of linears in ``online`` are rotated. ``cache``: how keys and values are stored.
        Raises QplugError if there are not enough samples for each process to have one.
        """
        if len(tokens) < processes.count:
            raise QplugError(
                f"{processes.count} processes cannot share {len(tokens)} calibration samples; "
                "raise --samples, or start fewer"
            )
        self._processes = processes
        self._source, self._view, self._schemes = source, view, schemes
        self._device, self._propagate, self._cache = device, propagate, cache
        self.dtype = passing_dtype(device, getattr(torch, view.dtype))
        config = load_config(source.folder, trust_remote_code=trust_remote_code)
        self._model = build(config, source.folder, trust_remote_code=trust_remote_code).eval()
        rotate_inputs(self._model, online)
        as_on_disk(self._model, view.blocks, source.tensors)
        self._blocks = {name: self._model.get_submodule(name) for name in view.blocks}
        self._structures: dict[tuple[Any, ...], tuple[Group, ...]] = {}
        self._parameters = {
            name: [
                local
                for local, value in block.state_dict(keep_vars=True).items()
                if isinstance(value, nn.Parameter) or f"{name}.{local}" in source.tensors
            ]
            for name, block in self._blocks.items()
        }
        self._buffers = {n for block in self._blocks.values() for n, _ in block.named_buffers()}
        self._reader = BlockReader(
            source, self._parameters, clock or Stopwatch(), pinned=device.type == "cuda"
        )
        self._with_drift = with_drift and propagate == "quantized"
        self._with_targets = with_targets
        # Whether what the float model has at each block is computed beside, or alone.
        self._with_float = with_drift or with_targets or propagate == "float"
        # What enters the next block; what would in the float model, once that is something else;
        # and what leaves the block that is being worked on, as a float one.
        size = batch_size or samples_in_a_batch(tokens.shape[1], device)
        parts = [part.split(size) for part in tokens.tensor_split(processes.count)]
        self._shares = Shares([len(part) for part in parts], processes.rank)
        batches = parts[processes.rank]
        self._tokens_by_batch = real_tokens(parts)
        # Behind its end a sample is filled with tokens that no other sees: blocks are causal.
        self._real = [None if (batch >= 0).all() else (batch >= 0) for batch in batches]
        self._hidden, self._calls = self._catch([batch.clamp(min=0) for batch in batches])
        self._ideal: HiddenStates | None = None
        self._ahead: HiddenStates | None = None

    # --- before the first block ------------------------------------------------------------------

    @torch.no_grad()
    def _catch(
        self, batches: Sequence[Tensor]
    ) -> tuple[HiddenStates, dict[str, list[dict[str, Any]]]]:
        """The hidden states that enter block 0, batch by batch, and how each block is called."""
        outer = [
            name
            for name, _ in self._model.base_model.named_parameters(
                prefix=self._model.base_model_prefix
            )
            if block_of(name, self._view.blocks) is None
        ]
        self._reader.start(self._view.blocks[0])
        there = [name for name in outer if name in self._source.tensors]
        held = {name: self._source.read(name).to(self._device) for name in there}
        refuse_infinite(held)
        fill_parameters(self._model, self._computable(held))
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self._device)
        recorders = {name: Recorder(block) for name, block in self._blocks.items()}
        parent = self._model.get_submodule(module_of(self._view.blocks[0]))
        assert isinstance(parent, nn.ModuleList)
        hidden = HiddenStates(self._device)
        for index, recorder in enumerate(recorders.values()):
            parent[index] = recorder
        try:
            for batch in batches:
                self._model.base_model(input_ids=batch.to(self._device), use_cache=False)
                hidden.append(recorders[self._view.blocks[0]].hidden)
        finally:
            for index, block in enumerate(self._blocks.values()):
                parent[index] = block
            empty_parameters(self._model, outer)
        return hidden, {name: recorder.calls for name, recorder in recorders.items()}

    # --- a block ---------------------------------------------------------------------------------

    @torch.no_grad()
    def enter(self, name: str) -> LiveBlock:
        """Read block ``name`` and gather the statistics of what its linears read."""
        read = self._reader.read(name)
        weights = {n: w.to(self._device, non_blocking=True) for n, w in read.items()}
        del read
        refuse_infinite({f"{name}.{local}": weight for local, weight in weights.items()})
        structure = self._structure(name, weights)
        values = self._computable(weights)
        if self._with_float:
            self._ahead = HiddenStates(self._device)
        statistics = self._observe(name, structure, values, values, self._ahead)
        del values
        block = LiveBlock(
            name,
            structure,
            statistics,
            weights,
            self._schemes,
            {local: self._source.tensors[f"{name}.{local}"].spec.dtype for local in weights},
            partial(self._observe_again, name, structure),
            self._processes,
        )
        if self._with_targets:
            assert self._ahead is not None
            data = Data(
                self._hidden, self._ahead, self._calls[name], self._real, self._tokens_by_batch
            )
            block.reconstruction = LiveReconstruction(
                block, self._blocks[name], data, self._device, self._processes
            )
        return block

    def _structure(self, name: str, weights: Mapping[str, Tensor]) -> tuple[Group, ...]:
        """Found once for all blocks that are alike, in float32, on random weights and tokens.

        Not on the block's own: where those are zero, or small beside the residual, a wrong answer
        would look right, and a run that goes on at a later block could find another.
        """
        module = self._blocks[name]
        kinds = tuple(sorted({str(type(part)) for part in module.modules()}))
        key = (*kinds, *((local, tuple(weight.shape)) for local, weight in weights.items()))
        if key not in self._structures:
            generator = torch.Generator(self._device).manual_seed(0)
            draw = partial(torch.rand, generator=generator, device=self._device)
            for local, weight in weights.items():
                values = draw(weight.shape)  # norms stay away from zero, matrices keep variance
                if weight.ndim < 2:
                    values += 0.5
                else:
                    values = (values - 0.5) * (12 / weight.shape[-1]) ** 0.5
                set_parameter(module, local, values)
            length, width = next(iter(self._hidden)).shape[1:]
            probe = draw(1, min(_PROBE, length), width) - 0.5
            call = shortened(self._calls[name][0], _PROBE, torch.float32)
            self._structures[key] = find_groups(module, lambda: first_tensor(module(probe, **call)))
            empty_parameters(module, weights)
        return self._structures[key]

    def _observe(
        self,
        name: str,
        structure: tuple[Group, ...],
        values: Mapping[str, Tensor],
        float_values: Mapping[str, Tensor],
        ahead: HiddenStates | None = None,
    ) -> dict[str, Statistics]:
        """What is seen of ``structure`` with the parameters ``values``, by ``Observation``'s paths.

        With ``float_values`` the block computes as the float one; what then leaves it goes to
        ``ahead``.
        """
        module = self._blocks[name]
        observation = Observation(
            module,
            structure,
            within(name, self._schemes),
            self._shares,
            self._device,
            with_drift=self._with_drift and self._ideal is not None,
        )
        beside = self._ideal if self._with_drift or ahead is not None else None
        ideals: Iterable[Tensor | None] = beside or [None] * len(self._hidden)
        for batch, ideal, call, real in zip(
            self._hidden, ideals, self._calls[name], self._real, strict=True
        ):
            wanted: dict[str, tuple[Tensor, Tensor | None]] = {}
            after = None
            if ideal is not None:
                with observation.noting(wanted) if self._with_drift else nullcontext():
                    after = call_block(module, float_values, ideal, call)
            feeds = ahead is not None and after is None
            with observation.watching(batch.shape[1], real, wanted, stop=not feeds):
                left = call_block(module, values, batch, call)
                after = left if feeds else after
            if ahead is not None and after is not None:
                ahead.append(after)
        observation.share(self._processes)
        return observation.statistics

    @torch.no_grad()
    def _observe_again(
        self,
        name: str,
        structure: tuple[Group, ...],
        values: Mapping[str, Tensor],
        float_values: Mapping[str, Tensor],
        rounded: Sequence[str],
    ) -> dict[str, Statistics]:
        """``_observe`` in the midst of a block, the inputs of linears in ``rounded`` rounded."""
        parameters = {local: values[local] for local in self._parameters[name]}
        with self._rounding_inputs(name, rounded, values):
            return self._observe(
                name, structure, self._computable(parameters), self._computable(float_values)
            )

    @torch.no_grad()
    def leave(self, name: str, served: Mapping[str, Tensor]) -> None:
        """Send the tokens through the block with the parameters ``served``, and free it.

        ``served``: every parameter by its name within the block, with the value an engine will use,
        and the scales of static inputs and of the KV cache.
        """
        if self._propagate == "quantized" and name != self._view.blocks[-1]:
            values = self._computable({local: served[local] for local in self._parameters[name]})
            rounded = self._rounded_cache(name, served)
            with self._rounding_inputs(name, self._parameters[name], served):
                calls = zip(self._hidden, self._calls[name], strict=True)
                for index, (batch, call) in enumerate(calls):
                    after = call_block(self._blocks[name], values, batch, {**call, **rounded})
                    self._hidden.put(index, after)
            self._ideal = self._ahead
        elif self._ahead is not None:
            self._hidden = self._ahead
        self._ahead = None
        self._calls.pop(name)

    @torch.no_grad()
    def cache_scales(self, name: str, served: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scales of keys and values, float32 ``[1]``, by name in the block; none without cache.

        ``served`` as for ``leave``: what they must cover is what the quantized block computes,
        after all that algorithms moved. Raises QplugError if that is not finite.
        """
        if self._cache is None:
            return {}
        observer = ObservedCache()
        values = self._computable({local: served[local] for local in self._parameters[name]})
        with self._rounding_inputs(name, self._parameters[name], served):
            for batch, call, real in zip(self._hidden, self._calls[name], self._real, strict=True):
                observer.real = real
                call_block(
                    self._blocks[name], values, batch, {**call, self._cache.argument: observer}
                )
        attention = self._cache.modules[name]
        if observer.times != len(self._hidden):
            raise QplugError(f"{name}: fills a KV cache not once, so one scale does not fit it")
        self._processes.reduce(most=observer.peaks)
        scales = observer.scales(self._cache.args, f"{name}.{attention}")
        return {f"{attention}.{local}": scale for local, scale in zip(SCALES, scales, strict=True)}

    @torch.no_grad()
    def replay(self, name: str, served: Mapping[str, Tensor]) -> None:
        """``leave`` for a block that was finished by an earlier run."""
        if self._with_float:
            values = self._computable(self._reader.read(name))
            self._ahead = HiddenStates(self._device)
            for batch, call in zip(self._ideal or self._hidden, self._calls[name], strict=True):
                self._ahead.append(call_block(self._blocks[name], values, batch, call))
        self.leave(name, served)

    def _rounded_cache(self, name: str, served: Mapping[str, Tensor]) -> dict[str, RoundedCache]:
        """The argument that makes a block round keys and values; none without cache."""
        if self._cache is None:
            return {}
        scales = (served[f"{self._cache.modules[name]}.{local}"] for local in SCALES)
        return {self._cache.argument: RoundedCache(self._cache.args, tuple(scales))}

    def _rounding_inputs(
        self, name: str, among: Sequence[str], served: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Within it, linears whose weights are ``among`` the given read what the scheme rounds.

        ``served`` has the scales of static inputs.
        """
        roundings = {}
        for local in among:
            path = local.removesuffix(".weight")
            scheme = self._schemes.get(f"{name}.{path}")
            if scheme is not None and scheme.activations is not None:
                scale = served.get(f"{path}.input_scale")
                scale = None if scale is None else scale.to(self._device)
                roundings[path] = InputRounding(scheme.activations, scale)
        return rounding_inputs(self._blocks[name], roundings)

    def _computable(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``values`` where blocks are computed, and in the dtype in which they are.

        Buffers, as the correction of a router, stay in their own.
        """
        return {
            name: value.to(self._device, None if name in self._buffers else self.dtype)
            for name, value in values.items()
        }
