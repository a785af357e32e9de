"""Calibration tokens on their way through a model, one decoder block at a time.

Weights of one block are in memory, and the hidden states of all tokens between two blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from qplug.api import ModelView
from qplug.api.scheme import Scheme
from qplug.api.tensors import Checkpoint
from qplug.calibration.batches import counted_tokens, samples_in_a_batch
from qplug.calibration.block_modules import BlockModules
from qplug.calibration.block_parts import BlockParts
from qplug.calibration.block_reader import BlockReader
from qplug.calibration.block_room import BlockRoom
from qplug.calibration.block_structures import PROBE, BlockStructures
from qplug.calibration.cache_scales import (
    CalledBatch,
    find_cache_scales,
    rounded_cache,
    rounded_queries,
)
from qplug.calibration.entrance import Entrance
from qplug.calibration.hidden_states import HiddenStates
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.observation import FloatInputs, Observation, SampleQuota, Seen
from qplug.calibration.reconstruction import Data, LiveReconstruction
from qplug.calibration.samples import Samples
from qplug.calibration.statistics import Statistics, share
from qplug.calibration.stream import Compute, Stream
from qplug.calibration.stream_distance import StreamDistance
from qplug.checkpoint.into_memory import See
from qplug.checkpoint.names import within
from qplug.errors import QplugError
from qplug.machine.memory import free_workspaces
from qplug.machine.session import Session
from qplug.model.block_call import BlockCall, Output, hidden_states
from qplug.model.experts import alike_in
from qplug.model.input_groups import GroupPaths
from qplug.model.kv_cache import KVCache
from qplug.model.parameters import refuse_infinite
from qplug.model.skeleton import Skeleton
from qplug.numerics.alike import copied


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
        all_experts: bool = False,
        batch_size: int | None = None,
        with_drift: bool = False,
        with_targets: bool = False,
        with_distance: bool = False,
        online: Sequence[str] = (),
        cache: KVCache | None = None,
        skeleton: Skeleton | None = None,
        memory: int | None = None,
        by_group: bool = False,
        see: See | None = None,
    ) -> None:
        """Each process of ``session`` takes a part of the ``samples``.

        ``all_experts`` shows each expert all tokens of its layer, for statistics alone.
        ``with_drift`` gathers ``InputGroup.drift``; ``with_targets`` gives blocks a
        ``reconstruction``; ``with_distance`` measures ``distance``. ``online``: names of linears
        whose inputs are rotated while the model runs. ``cache``: how keys and values are stored,
        None if not quantized. ``skeleton``: of the source, if it is made already. ``memory``: bytes
        that a block may take; by default those that are free. ``by_group``: whether input groups
        may come one after another if a block takes more. ``see``: what ``BlockReader`` tells of
        tensors that it reads. Raises QplugError if there are fewer samples than processes.
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
            skeleton or Skeleton(source.folder, trust_remote_code=session.trust_remote_code),
            online=online,
        )
        self._structures = BlockStructures(device)
        self._reader = BlockReader(
            source, self._blocks.parameters, session.clock, pinned=device.type == "cuda", see=see
        )
        self._reader.start(view.blocks[0])
        self._with_drift = with_drift and propagate == "quantized"
        self._with_targets, self._all_experts = with_targets, all_experts
        self._keeps_targets = with_targets or with_distance  # the float block's outputs
        # Whether the float model runs too, or alone.
        self._with_float = with_drift or with_targets or with_distance or propagate == "float"
        self._with_distance = with_distance
        #: How far the residual stream after the last block is from the float model's: the mean over
        #: tokens of ``||x' - x|| / ||x||``. None unless it is measured.
        self.distance: float | None = None
        size = batch_size or samples_in_a_batch(samples.length, device)
        parts = [part.batches(size) for part in samples.shared_by(processes.count)]
        self._quota = SampleQuota([len(part) for part in parts], processes.rank)
        batches = parts[processes.rank]
        self._tokens_by_batch = counted_tokens(parts)
        # Short samples are padded on the right; causal attention keeps padding from real tokens.
        self._real = [batch.real for batch in batches]
        self._seen = [
            Seen(len(batch), batch.length, real, real if batch.mask is None else batch.mask)
            for batch, real in zip(batches, self._real, strict=True)
        ]
        #: What of a block is in memory at once, and where the values of its parts wait.
        self.room = BlockRoom(
            source,
            self._blocks,
            session,
            memory=memory,
            # The float experts must compute too, and a cache is rounded in a whole block.
            divides=not self._with_float and cache is None,
            by_group=by_group,
            tokens=sum(seen.windows * seen.length for seen in self._seen),
        )
        entrance = self._entrance = Entrance(self._blocks, source)
        weakref.finalize(self, entrance.close)
        # What a few tokens meet shows how the linears of a block are connected.
        self._probe = self._begin(entrance, [samples.probe(PROBE)])
        # The batches in the model whose statistics are taken, and in the float model if that is
        # another. Before the first block both agree.
        self._stream = self._begin(entrance, batches)
        self._float_stream: Stream | None = None
        if self._with_float and propagate == "quantized":
            self._float_stream = self._begin(entrance, batches)
        self._agree = True
        self._targets: HiddenStates | None = None
        entrance.free_embeddings()
        free_workspaces(device)  # each pass has a thread, which has multiplied positions

    def _begin(self, entrance: Entrance, batches: Sequence[Samples]) -> Stream:
        stream = Stream([entrance.begin(batch) for batch in batches], self._device)
        # Passes would wait for ever in their threads.
        weakref.finalize(self, stream.close)
        return stream

    def close(self) -> None:
        """Ends the passes of the model, of which each has a thread, and frees what they hold."""
        for stream in (self._probe, self._stream, self._float_stream):
            if stream is not None:
                stream.close()
        self._entrance.close()
        self.room.clear()
        self._targets = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which blocks compute."""
        return self._blocks.dtype

    @property
    def hidden(self) -> HiddenStates:
        """The hidden states that enter the next block, by batch."""
        return self._stream.hidden

    @torch.no_grad()
    def gather(self, name: str) -> LiveBlock:
        """Reads block ``name`` and returns it with the statistics of what its linears read.

        Raises QplugError if a weight is not finite.
        """
        return self._gathered(name, self._reader.read(name))

    @torch.no_grad()
    def gather_again(self, name: str, schemes: Mapping[str, Scheme]) -> LiveBlock:
        """Like ``gather`` of block ``name``, which was gathered already, under other ``schemes``.

        ``schemes`` are those of all linears from now on.
        """
        self._schemes = schemes
        self._blocks.reassign(schemes)
        return self._gathered(name, self._reader.read(name), first=False)

    def gather_parts(self, name: str) -> Iterator[LiveBlock]:
        """Yields ``gather(name)``, or parts of it if there is not memory for all of it at once.

        Of a block with experts the first part is the block without them; others have some of the
        experts each. No scale can be moved from outside of the experts into them. Other blocks are
        divided ``by_group``. Use a part before the next one.
        """
        on_cpu = self._reader.read(name)
        parts = BlockParts(self, self._blocks, self._processes)  # not kept: it refers to the walk
        portions = self.room.portions(name, on_cpu, self._schemes)
        if portions is not None:
            yield from parts.in_portions(name, on_cpu, portions)
        elif groups := self.room.groups(
            name, partial(self.structure, name, on_cpu), on_cpu, self._schemes
        ):
            yield from parts.group_by_group(name, on_cpu, groups)
        else:
            whole = [self._gathered(name, on_cpu)]
            del on_cpu  # the block has copies in float32; no local refers to what is yielded
            yield whole.pop()

    @torch.no_grad()
    def _gathered(
        self, name: str, on_cpu: Mapping[str, Tensor], *, first: bool = True
    ) -> LiveBlock:
        structure = self.structure(name, on_cpu)
        weights = self.on_device(name, on_cpu)
        parameters = self._blocks.computable(weights)
        statistics = self.observe(name, structure, parameters, parameters, first=first)
        if first and self._propagate == "float" and name != self._view.blocks[-1]:
            self._replace(name, self._probe, self._blocks.computing(name, parameters))
        del parameters
        block = self.live(name, structure, statistics, weights)
        if self._with_targets and self._targets is not None:
            stream = self._stream
            data = Data(
                stream.hidden,
                self._targets,
                stream.calls,
                [seen.counted for seen in self._seen],
                self._tokens_by_batch,
            )
            block.reconstruction = LiveReconstruction(
                block, self._blocks.modules[name], data, self._device, self._processes
            )
        return block

    @torch.no_grad()
    def structure(self, name: str, weights: Mapping[str, Tensor]) -> tuple[GroupPaths, ...]:
        """The input groups of block ``name``, whose parameters are shaped as ``weights``."""
        self._probe.expect(name)
        (probe,) = self._probe
        return self._structures.of(self._blocks.modules[name], weights, probe)

    def on_device(self, name: str, on_cpu: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights ``on_cpu`` of block ``name``, checked."""
        alike = alike_in(self._blocks.modules[name]) if self._device.type == "cuda" else []
        here = [own for names in alike if (own := [n for n in names if n in on_cpu])]
        weights = copied(on_cpu, None, here, self._device)
        refuse_infinite(
            {f"{name}.{n}": w for n, w in weights.items()},
            self._view.dtype,
            [[f"{name}.{n}" for n in names] for names in here],
        )
        return weights

    def live(
        self,
        name: str,
        structure: tuple[GroupPaths, ...],
        statistics: Mapping[str, Statistics],
        weights: Mapping[str, Tensor],
    ) -> LiveBlock:
        """The block ``name``, or a part of it, with ``weights`` on the device."""
        alike = alike_in(self._blocks.modules[name])
        is_whole = len(weights) == len(self._blocks.parameters[name])
        return LiveBlock(
            name,
            structure,
            statistics,
            weights,
            self._schemes,
            {local: self._source.tensors[f"{name}.{local}"].spec.dtype for local in weights},
            partial(self._observe_again, name, structure, is_whole),
            self._processes,
            alike=[own for names in alike if (own := [n for n in names if n in weights])],
            is_whole=is_whole,
        )

    @torch.no_grad()
    def measured(self, name: str, effective: Mapping[str, Tensor]) -> float:
        """Returns what ``distance`` would be after block ``name`` with parameters ``effective``.

        The tokens stay before the block.
        """
        with self._advancing(name, effective) as (_, through_cache):
            return self._distance_of(name, through_cache, replaces=False)

    @torch.no_grad()
    def advance(self, name: str, effective: Mapping[str, Tensor]) -> None:
        """Sends the tokens through block ``name`` with the parameters ``effective``."""
        is_last = name == self._view.blocks[-1]
        if is_last and not self._with_distance:
            return
        if self._propagate == "float":
            self._stream.step()
            return
        with self._advancing(name, effective) as (compute, through_cache):
            if self._with_distance:
                self.distance = self._distance_of(name, through_cache, replaces=not is_last)
            else:
                self._replace(name, self._stream, through_cache)
            if is_last:
                return
            self._replace(name, self._probe, compute)
        if self._float_stream is not None:
            self._float_stream.step()
            self._agree = False

    @contextmanager
    def _advancing(
        self, name: str, effective: Mapping[str, Tensor]
    ) -> Iterator[tuple[Compute, Compute]]:
        """Within it, the two functions compute block ``name`` with parameters ``effective``.

        The second one rounds keys and values if the KV cache is quantized.
        """
        self.room.clear()
        parameters = self._blocks.parameters_of(name, effective, self.room.on_host(name))
        with self._blocks.rounding_inputs(name, self._blocks.parameters[name], effective):
            compute = self._blocks.computing(name, parameters)
            yield compute, self._through_cache(name, effective, compute)

    def _distance_of(self, name: str, compute: Compute, *, replaces: bool) -> float:
        """Returns the distance after block ``name``; ``replaces`` as ``_replace`` of the stream."""
        assert self._targets is not None
        distance = StreamDistance(self._real)
        self._stream.expect(name)
        calls = zip(self._stream, self._targets, strict=True)
        for index, (call, target) in enumerate(calls):
            output = compute(call if replaces else call.apart())
            distance.add(index, hidden_states(output), target)
            if replaces:
                self._stream.replace(index, call, output, compute)
        return distance.shared(self._processes)

    @torch.no_grad()
    def skip(self, name: str, effective: Mapping[str, Tensor]) -> None:
        """``advance`` for a block that an earlier run has finished; gathers no statistics."""
        if self._with_float and (self._with_distance or name != self._view.blocks[-1]):
            parameters = self._blocks.computable(self._reader.read(name))
            compute = self._blocks.computing(name, parameters)
            stream = self._float_stream or self._stream
            stream.expect(name)
            self._targets = HiddenStates(self._device) if self._with_distance else None
            for index, call in enumerate(stream):
                self._pass_on_float(name, index, call, compute(call), compute)
            if self._propagate == "float":
                self._replace(name, self._probe, compute)
        self.advance(name, effective)

    def _replace(self, name: str, stream: Stream, compute: Compute) -> None:
        stream.expect(name)
        for index, call in enumerate(stream):
            stream.replace(index, call, compute(call), compute)

    def _through_cache(
        self, name: str, effective: Mapping[str, Tensor], compute: Compute
    ) -> Compute:
        """``compute``, with a cache that rounds keys and values if the KV cache is quantized.

        Queries are rounded too, if they have a scale.
        """
        if self._cache is None:
            return compute
        argument, cache = self._cache.argument, rounded_cache(self._cache, name, effective)
        queries = rounded_queries(self._cache, name, effective)

        def through(call: BlockCall) -> Output:
            with queries.rounding() if queries is not None else nullcontext():
                return compute(call.with_argument(argument, cache))

        return through

    @torch.no_grad()
    def cache_scales(self, name: str, effective: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scales of keys and values of block ``name``, by relative name; empty without cache.

        Raises QplugError as ``find_cache_scales``.
        """
        if self._cache is None:
            return {}
        return find_cache_scales(
            self._cache, self._blocks, name, effective, self._batches(), self._processes
        )

    def _batches(self) -> Iterator[CalledBatch]:
        return zip(self._stream, self._real, strict=True)

    def observe(
        self,
        name: str,
        structure: tuple[GroupPaths, ...],
        parameters: Mapping[str, Tensor],
        float_parameters: Mapping[str, Tensor],
        *,
        first: bool = False,
    ) -> dict[str, Statistics]:
        """The statistics of the groups in ``structure``, by the module path they are taken at.

        As ``passed``, with the experts.
        """
        observation = self.passed(name, structure, parameters, float_parameters, first=first)
        observation.experts(parameters, float_parameters)
        share(list(observation.statistics.values()), self._processes)
        return observation.statistics

    def passed(
        self,
        name: str,
        structure: tuple[GroupPaths, ...],
        parameters: Mapping[str, Tensor],
        float_parameters: Mapping[str, Tensor],
        *,
        first: bool = False,
    ) -> Observation:
        """An observation of all batches, whose experts are still to be computed.

        The block computes with ``parameters``, and the float model's block with
        ``float_parameters``. The ``first`` pass at a block sends the float model on, if it runs.
        """
        blocks = self._blocks
        observation = Observation(
            blocks.modules[name],
            structure,
            within(name, self._schemes),
            self._quota,
            self._device,
            with_drift=self._with_drift and not self._agree,
            all_experts=self._all_experts,
        )
        float_stream = self._float_stream or self._stream
        passes_on = first and self._with_float
        # While both models agree, one pass serves both.
        serves_both = passes_on and self._agree
        main = float_stream if serves_both else self._stream
        beside: Stream | None = None
        if not self._agree and (self._with_drift or passes_on):
            beside = float_stream
        compute = blocks.computing(name, parameters)
        compute_float = compute
        if float_parameters is not parameters:
            compute_float = blocks.computing(name, float_parameters)
        if first:
            self._targets = HiddenStates(self._device) if self._keeps_targets else None
        for stream in (main, beside or main):
            stream.expect(name)
        float_calls: Iterable[BlockCall | None] = beside or [None] * len(main)
        batches = zip(main, float_calls, self._seen, strict=True)
        for index, (call, float_call, seen) in enumerate(batches):
            seen_by_float: FloatInputs = {}
            float_output: Output = None
            if float_call is not None:
                recording = observation.recording_float(seen_by_float)
                with recording if self._with_drift else nullcontext():
                    float_output = compute_float(float_call if passes_on else float_call.apart())
            with observation.gathering(seen, seen_by_float, stop=not serves_both):
                output = compute(call if serves_both else call.apart())
                float_output = output if serves_both else float_output
            if passes_on:
                self._pass_on_float(name, index, float_call or call, float_output, compute_float)
        return observation

    def _pass_on_float(
        self, name: str, index: int, call: BlockCall, output: Output, compute: Compute
    ) -> None:
        """Keeps the ``output`` of the float block ``name``, and sends batch ``index`` on."""
        if self._targets is not None:
            self._targets.append(hidden_states(output))
        if name != self._view.blocks[-1]:
            (self._float_stream or self._stream).append(index, call, output, compute)

    @torch.no_grad()
    def _observe_again(
        self,
        name: str,
        structure: tuple[GroupPaths, ...],
        is_whole: bool,
        values: Mapping[str, Tensor],
        float_values: Mapping[str, Tensor],
        rounded: Sequence[str],
    ) -> dict[str, Statistics]:
        """Like ``observe``, but half-way through a block.

        ``values`` and ``float_values`` are parameters of the block and of the float block; linears
        of the weights in ``rounded`` read rounded inputs. Raises QplugError unless ``is_whole``.
        """
        if not is_whole:
            raise QplugError(
                f"{name}: does not fit into memory at once, as this algorithm or option needs; "
                "raise --memory, or use fewer --samples"
            )
        with self._blocks.rounding_inputs(name, rounded, values):
            return self.observe(
                name,
                structure,
                self._blocks.parameters_of(name, values),
                self._blocks.computable(float_values),
            )
