"""Calibration tokens on their way through a model, one decoder block at a time.

Weights of one block are in memory, and the hidden states of all tokens between two blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from qplug.api import ModelView
from qplug.api.scheme import Scheme
from qplug.api.tensors import Checkpoint
from qplug.calibration.batches import counted_tokens, samples_in_a_batch
from qplug.calibration.block_modules import BlockModules
from qplug.calibration.block_reader import BlockReader
from qplug.calibration.block_structures import BlockStructures
from qplug.calibration.cache_scales import CalledBatch, find_cache_scales, rounded_cache
from qplug.calibration.first_inputs import catch_first_inputs
from qplug.calibration.hidden_states import HiddenStates
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.observation import FloatInputs, Observation, SampleQuota, Seen
from qplug.calibration.reconstruction import Data, LiveReconstruction
from qplug.calibration.samples import Samples
from qplug.calibration.statistics import Statistics
from qplug.checkpoint.names import within
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.input_groups import GroupPaths
from qplug.model.kv_cache import KVCache
from qplug.model.parameters import refuse_infinite


class Walk:
    """Takes calibration tokens through the blocks of a model, in order.

    For each block, call ``gather`` and then ``advance``; or call ``skip`` for a block that an
    earlier run has finished. Parameters of a block go by their names relative to the block. Its
    effective parameters are the values with which an engine will compute, together with the scales
    of static inputs and of the KV cache.
    """

    def __init__(
        self,
        source: Checkpoint,
        view: ModelView,
        schemes: Mapping[str, Scheme],
        samples: Samples,
        session: Session,
        *,
        propagate: str = "quantized",
        batch_size: int | None = None,
        with_drift: bool = False,
        with_targets: bool = False,
        online: Sequence[str] = (),
        cache: KVCache | None = None,
    ) -> None:
        """Each process of ``session`` takes a part of the ``samples``.

        ``with_drift`` gathers
        ``InputGroup.drift``; ``with_targets`` gives blocks a ``reconstruction``. ``online``: names
        of linears whose inputs are rotated while the model runs. ``cache``: how keys and values are
        stored, None if not quantized. Raises QplugError if there are fewer samples than processes.
        """
        device, processes = session.device, session.processes
        if len(samples) < processes.count:
            raise QplugError(
                f"{processes.count} processes cannot share {len(samples)} calibration samples; "
                "raise --samples, or start fewer"
            )
        self._processes = processes
        self._source, self._view, self._schemes = source, view, schemes
        self._device, self._propagate, self._cache = device, propagate, cache
        self._blocks = BlockModules(
            source,
            view,
            schemes,
            device,
            online=online,
            trust_remote_code=session.trust_remote_code,
        )
        self._structures = BlockStructures(device)
        self._reader = BlockReader(
            source, self._blocks.parameters, session.clock, pinned=device.type == "cuda"
        )
        self._reader.start(view.blocks[0])
        self._with_drift = with_drift and propagate == "quantized"
        self._with_targets = with_targets
        # Whether the float model runs too, or alone.
        self._with_float = with_drift or with_targets or propagate == "float"
        size = batch_size or samples_in_a_batch(samples.length, device)
        parts = [part.batches(size) for part in samples.shared_by(processes.count)]
        self._quota = SampleQuota([len(part) for part in parts], processes.rank)
        batches = parts[processes.rank]
        self._tokens_by_batch = counted_tokens(parts)
        # Short samples are padded on the right; causal attention keeps padding from real tokens.
        self._real = [batch.real for batch in batches]
        self._counted = [
            real if batch.mask is None else batch.mask
            for batch, real in zip(batches, self._real, strict=True)
        ]
        first = catch_first_inputs(self._blocks, source, batches)
        self._calls = first.calls
        # Hidden states that enter the next block; the same in the float model, None while both
        # agree; and those that leave the current block in the float model.
        self._inputs: HiddenStates = first.hidden
        self._float_inputs: HiddenStates | None = None
        self._float_outputs: HiddenStates | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which blocks compute."""
        return self._blocks.dtype

    @torch.no_grad()
    def gather(self, name: str) -> LiveBlock:
        """Reads block ``name`` and returns it with the statistics of what its linears read.

        Raises QplugError if a weight is not finite.
        """
        on_cpu = self._reader.read(name)
        weights = {n: w.to(self._device, non_blocking=True) for n, w in on_cpu.items()}
        del on_cpu
        refuse_infinite({f"{name}.{n}": w for n, w in weights.items()}, self._view.dtype)
        length, width = next(iter(self._inputs)).shape[1:]
        structure = self._structures.of(
            self._blocks.modules[name], weights, self._calls[name][0], (length, width)
        )
        parameters = self._blocks.computable(weights)
        if self._with_float:
            self._float_outputs = HiddenStates(self._device)
        statistics = self._observe(name, structure, parameters, parameters, self._float_outputs)
        del parameters
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
            assert self._float_outputs is not None
            data = Data(
                self._inputs,
                self._float_outputs,
                self._calls[name],
                self._counted,
                self._tokens_by_batch,
            )
            block.reconstruction = LiveReconstruction(
                block, self._blocks.modules[name], data, self._device, self._processes
            )
        return block

    @torch.no_grad()
    def advance(self, name: str, effective: Mapping[str, Tensor]) -> None:
        """Sends the tokens through block ``name`` with the parameters ``effective``."""
        if self._propagate == "quantized" and name != self._view.blocks[-1]:
            parameters = self._blocks.parameters_of(name, effective)
            cache = {}
            if self._cache is not None:
                cache = {self._cache.argument: rounded_cache(self._cache, name, effective)}
            with self._blocks.rounding_inputs(name, self._blocks.parameters[name], effective):
                calls = zip(self._inputs, self._calls[name], strict=True)
                for index, (batch, call) in enumerate(calls):
                    output = self._blocks.compute(name, parameters, batch, {**call, **cache})
                    self._inputs.put(index, output)
            self._float_inputs = self._float_outputs
        elif self._float_outputs is not None:
            self._inputs = self._float_outputs
        self._float_outputs = None
        self._calls.pop(name)

    @torch.no_grad()
    def skip(self, name: str, effective: Mapping[str, Tensor]) -> None:
        """``advance`` for a block that an earlier run has finished; gathers no statistics."""
        if self._with_float:
            parameters = self._blocks.computable(self._reader.read(name))
            self._float_outputs = HiddenStates(self._device)
            inputs = self._float_inputs or self._inputs
            for batch, call in zip(inputs, self._calls[name], strict=True):
                self._float_outputs.append(self._blocks.compute(name, parameters, batch, call))
        self.advance(name, effective)

    @torch.no_grad()
    def cache_scales(self, name: str, effective: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scales of keys and values of block ``name``, by relative name; empty without cache.

        Raises QplugError as ``find_cache_scales``.
        """
        if self._cache is None:
            return {}
        return find_cache_scales(
            self._cache, self._blocks, name, effective, self._batches(name), self._processes
        )

    def _batches(self, name: str) -> Iterator[CalledBatch]:
        return zip(self._inputs, self._calls[name], self._real, strict=True)

    def _observe(
        self,
        name: str,
        structure: tuple[GroupPaths, ...],
        parameters: Mapping[str, Tensor],
        float_parameters: Mapping[str, Tensor],
        float_outputs: HiddenStates | None = None,
    ) -> dict[str, Statistics]:
        """The statistics of the groups in ``structure``, by the module path they are taken at.

        The block computes with ``parameters``; where the float model runs too, its block computes
        with ``float_parameters``, and what leaves it is appended to ``float_outputs``.
        """
        blocks = self._blocks
        observation = Observation(
            blocks.modules[name],
            structure,
            within(name, self._schemes),
            self._quota,
            self._device,
            with_drift=self._with_drift and self._float_inputs is not None,
        )
        apart = self._with_drift or float_outputs is not None
        float_inputs = self._float_inputs if apart else None
        float_batches: Iterable[Tensor | None] = float_inputs or [None] * len(self._inputs)
        for (batch, call, real), counted, float_batch in zip(
            self._batches(name), self._counted, float_batches, strict=True
        ):
            seen_by_float: FloatInputs = {}
            float_output = None
            if float_batch is not None:
                recording = observation.recording_float(seen_by_float)
                with recording if self._with_drift else nullcontext():
                    float_output = blocks.compute(name, float_parameters, float_batch, call)
            # While both models agree, this pass is the one of the float model too.
            is_float = float_outputs is not None and float_output is None
            seen = Seen(batch.shape[1], real, counted)
            with observation.gathering(seen, seen_by_float, stop=not is_float):
                output = blocks.compute(name, parameters, batch, call)
                float_output = output if is_float else float_output
            if float_outputs is not None and float_output is not None:
                float_outputs.append(float_output)
        observation.share(self._processes)
        return observation.statistics

    @torch.no_grad()
    def _observe_again(
        self,
        name: str,
        structure: tuple[GroupPaths, ...],
        values: Mapping[str, Tensor],
        float_values: Mapping[str, Tensor],
        rounded: Sequence[str],
    ) -> dict[str, Statistics]:
        """Like ``_observe``, but half-way through a block.

        ``values`` and ``float_values`` are parameters of the block and of the float block; linears
        of the weights in ``rounded`` read rounded inputs.
        """
        with self._blocks.rounding_inputs(name, rounded, values):
            return self._observe(
                name,
                structure,
                self._blocks.parameters_of(name, values),
                self._blocks.computable(float_values),
            )
