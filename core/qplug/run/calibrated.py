"""Runs with calibration data, block by block: gather statistics, transform, quantize, pass on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qplug.api.scheme import Scheme
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.ranges import input_ranges
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.names import by_module, module_of, relative_name, split_name
from qplug.model.kv_cache import KVCache
from qplug.model.skeleton import Skeleton
from qplug.output.plan import Step
from qplug.output.shared_writer import SharedWriter
from qplug.output.source_bytes import SourceBytes
from qplug.output.step_report import Report
from qplug.run.steps import Finished, Steps

if TYPE_CHECKING:
    from torch import Tensor


def start_walk(
    steps: Steps,
    schemes: Mapping[str, Scheme],
    samples: Samples,
    cache: KVCache | None,
    skeleton: Skeleton,
    source_bytes: SourceBytes,
) -> Walk:
    """Returns a walk of ``samples`` that stands at the first block.

    ``cache`` are the modules that fill a KV cache, if its scales are to be stored. The walk takes
    the model of ``skeleton``. The process that writes has ``source_bytes`` see what is read.
    """
    stages, prepared, session = steps.stages, steps.prepared, steps.session
    data = stages.recipe.calibration
    assert data is not None
    with session.clock("embedding"):
        return Walk(
            prepared.checkpoint,
            prepared.view,
            schemes,
            samples,
            session,
            propagate=data.propagate,
            all_experts=data.experts == "all",
            batch_size=data.batch_size,
            with_drift=stages.needs_drift,
            with_targets=stages.learns,
            with_distance=steps.watch is not None,
            online=prepared.online,
            cache=cache,
            skeleton=skeleton,
            memory=session.memory,
            by_group=stages.by_group,
            see=source_bytes.see if session.processes.is_first else None,
        )


def calibrated(
    steps: Steps, walk: Walk, output: SharedWriter, done: Collection[int]
) -> Iterator[Finished]:
    """Yields every step that is not ``done``, in order, as the tokens walk through the blocks.

    Closes ``walk`` at the end.
    """
    with closing(walk):
        yield from _walked(steps, walk, output, done)


def _walked(
    steps: Steps, walk: Walk, output: SharedWriter, done: Collection[int]
) -> Iterator[Finished]:
    for number, step in enumerate(steps.plan.steps):
        if step.name in steps.prepared.view.blocks:
            if number in done:
                walk.skip(step.name, _written(steps, steps.plan.steps[number], output))
                if steps.watch is not None and walk.distance is not None:
                    steps.watch.finished_before(step, walk.distance)
                continue
            computed = _computed(steps, number, _gathered(steps, walk, step), walk)
            if steps.watch is not None:
                steps, computed = _raised(steps, walk, number, computed, output)
            yield _passed_on(steps, walk, number, computed)
            del computed
        elif number not in done and step.linears:  # a head, whose inputs have no statistics
            yield steps.quantized(number, steps.weights(step), steps.stages.quantize_apart)
        elif number not in done:
            yield steps.copied(number)


@dataclass(frozen=True, eq=False)
class _Computed:
    """A block that is quantized: tensors to write, values to compute with, and the report."""

    packed: dict[str, Tensor]
    floats: dict[str, Tensor]
    parameters: dict[str, Tensor]
    scales: dict[str, Tensor]
    report: Report


def _computed(
    steps: Steps, number: int, gathered: Iterator[LiveBlock], walk: Walk, *, again: bool = False
) -> _Computed:
    """Transforms and quantizes a block, of which ``gathered`` are the parts, with statistics."""
    step, clock = steps.plan.steps[number], steps.session.clock
    parts = []
    for block in gathered:
        parts.append(_part(steps, walk, step, block, again=again))
        del block  # frees most of the GPU memory of the part, before the next one is made
    packed = {name: tensor for part in parts for name, tensor in part.packed.items()}
    floats = {name: tensor for part in parts for name, tensor in part.floats.items()}
    parameters = {name: value for part in parts for name, value in part.parameters.items()}
    report = Report.joined([part.report for part in parts])
    if len(parts) > 1:
        steps.watchers.block_done(step.name, report)
    del parts
    if (
        not steps.stages.exporter.format.is_lossless
    ):  # stored weights differ from the codes' meaning
        parameters |= _unpacked(steps, step, packed)
    with clock("passing on"):
        scales = walk.cache_scales(step.name, parameters)
    return _Computed(packed, floats, parameters | scales, scales, report)


def _raised(
    steps: Steps, walk: Walk, number: int, computed: _Computed, output: SharedWriter
) -> tuple[Steps, _Computed]:
    """Returns the block as it is within the limit, and the steps with the block raised so far.

    Without ``--on-stop raise`` these are ``computed`` and ``steps``. Raises KeptError if the block
    cannot be raised so far.
    """
    watch, step = steps.watch, steps.plan.steps[number]
    assert watch is not None
    if watch.raising is None:
        return steps, computed
    attempt = watch.raising.attempt(step)
    while True:
        with steps.session.clock("passing on"):
            distance = walk.measured(step.name, computed.parameters)
        run = attempt.next_run(distance)
        if run is None:
            break
        del computed
        steps = replace(steps, stages=run.stages, plan=run.plan)
        parts = _gathered_again(steps, walk, step.name, run.decision.schemes)
        computed = _computed(steps, number, parts, walk, again=True)
    if attempt.raised is not None:
        with steps.session.clock("writing"):
            output.raise_block(attempt.raised)
    return steps, computed


def _passed_on(steps: Steps, walk: Walk, number: int, computed: _Computed) -> Finished:
    """Sends the tokens through the block, and returns what is to be written of it."""
    step = steps.plan.steps[number]
    with steps.session.clock("passing on"):
        walk.advance(step.name, computed.parameters)
    if steps.watch is not None and walk.distance is not None:
        steps.watch.computed(step, walk.distance)
    floats, scales = computed.floats, computed.scales
    # Blocks of old checkpoints contain tensors that are not parameters, such as masks and tables.
    copies = steps.copies([name for name in step.others if name not in floats])
    cache = {f"{step.name}.{local}": scale for local, scale in scales.items()}
    return steps.finished(number, {**computed.packed, **floats, **copies, **cache}, computed.report)


@dataclass(frozen=True, eq=False)
class _Part:
    """What became of a part of a block: tensors to write, and values to compute with."""

    packed: dict[str, Tensor]
    floats: dict[str, Tensor]
    parameters: dict[str, Tensor]
    report: Report


def _gathered(steps: Steps, walk: Walk, step: Step) -> Iterator[LiveBlock]:
    """Yields the parts of a block with their statistics; there is one if there is memory for it."""
    parts = walk.gather_parts(step.name)
    while True:
        with steps.session.clock("statistics"):
            block = next(parts, None)
        if block is None:
            return
        yield block
        del block


def _gathered_again(
    steps: Steps, walk: Walk, name: str, schemes: Mapping[str, Scheme]
) -> Iterator[LiveBlock]:
    """Yields block ``name`` with the statistics for ``schemes``."""
    with steps.session.clock("statistics"):
        block = [walk.gather_again(name, schemes)]
    yield block.pop()


def _part(steps: Steps, walk: Walk, step: Step, block: LiveBlock, *, again: bool = False) -> _Part:
    """Transforms and quantizes ``block``, which is step ``step`` or a part of it.

    ``again``: the step was computed already, under other schemes.
    """
    stages = steps.stages
    inputs = input_ranges(block)
    codes = stages.quantize(block)  # all transforms, then the codes
    if stages.exporter.format.stores_float:
        block.clip()
    changed = {*block.rewritten(), *(n for n in steps.rewritten(step) if n in block.parameters)}
    report = stages.report(block, codes, tuple(sorted(changed)), inputs)
    if not block.is_whole:  # memory is scarce, and copies of the codes follow
        block.forget_statistics()
    packed = stages.pack(codes, step, steps.prepared.view.dtype)
    floats = block.stored_floats(step.others)
    if block.is_whole:
        steps.watchers.block_done(step.name, report, block, codes, again=again)
        block.forget_statistics()  # of experts they take as much as the next copies
    parameters = block.effective_parameters(codes, floats, walk.dtype)
    return _Part(packed, floats, walk.room.parked(step.name, parameters), report)


def _unpacked(steps: Steps, step: Step, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters that packed ``tensors`` stand for, by their names in the block.

    These are dequantized weights and, if they are static, scales of inputs. ``tensors`` are by full
    name.
    """
    parameters, exporter = {}, steps.stages.exporter
    stored = by_module(tensors)
    for name, scheme in step.linears.items():
        packed = {n: tensors[f"{name}.{n}"] for n in stored.get(name, ()) if n != "bias"}
        local = relative_name(step.name, name)
        parameters[f"{local}.weight"] = exporter.format.dequantize(packed, scheme)
        scale = exporter.format.input_scale(packed, scheme)
        if scale is not None:
            parameters[f"{local}.input_scale"] = scale
    return parameters


def _written(steps: Steps, step: Step, output: SharedWriter) -> dict[str, Tensor]:
    """Returns the parameters of a block that an earlier run wrote, by their names in the block."""
    floats = (*step.others, *step.cache_scales)
    stored = output.stored([*step.linears, *(module_of(name) for name in floats)])
    tensors = {
        f"{name}.{local}": tensor for name in step.linears for local, tensor in stored[name].items()
    }
    parameters = _unpacked(steps, step, tensors)
    for name in floats:
        path, local = split_name(name)
        parameters[relative_name(step.name, name)] = stored[path][local]
    return parameters
