"""The steps of a run at work: what each becomes, in the order in which they are written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from qplug.api import Block, Linear, ModelView
from qplug.api.scheme import Scheme
from qplug.api.tensors import Checkpoint
from qplug.calibration.ranges import input_ranges
from qplug.calibration.walk import Walk
from qplug.checkpoint.names import by_module, module_of, relative_name, split_name
from qplug.checkpoint.rewritten import rewritten_names
from qplug.machine.stopwatch import Stopwatch
from qplug.output.plan import Plan, Step
from qplug.output.shared_writer import SharedOutput
from qplug.output.step_report import Report
from qplug.output.writer import Content
from qplug.run.stages import Stages
from qplug.run.watchers import Announcer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: A finished step: its number, the tensors to write, and the report to leave in the journal.
Finished = tuple[int, Mapping[str, Content], Report]


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of ``plan``, which ``stages`` make of the float model in ``source``."""

    stages: Stages
    plan: Plan
    source: Checkpoint
    view: ModelView
    device: torch.device
    announcer: Announcer
    clock: Stopwatch

    def streamed(self, done: Collection[int]) -> Iterator[Finished]:
        """Every step that is left, one tensor at a time; the next is read meanwhile."""

        def read(number: int) -> list[Tensor]:
            return [self.source.read(f"{name}.weight") for name in self.plan.steps[number].linears]

        todo = [number for number in range(len(self.plan.steps)) if number not in done]
        with ThreadPoolExecutor(1, "qplug-reader") as reader:
            coming = reader.submit(read, todo[0]) if todo else None
            for number, after in zip_longest(todo, todo[1:]):
                assert coming is not None
                with self.clock("reading"):
                    weights = coming.result()
                coming = reader.submit(read, after) if after is not None else None
                step = self.plan.steps[number]
                if not weights:
                    yield self._copied(number, step)
                    continue
                linears = tuple(
                    self._linear(name, weight, scheme)
                    for weight, (name, scheme) in zip(weights, step.linears.items(), strict=True)
                )
                block = Block(step.name, linears)
                codes = self.stages.quantize(block)
                report = self.stages.report(block, codes, self._rewritten(step))
                self.announcer.block_done(step.name, report, block, codes)
                yield number, self.stages.pack(codes, step, self.view.dtype), report

    def _apart(self, number: int, step: Step) -> Finished:
        """A step of a calibrated run that is no decoder block: a tensor to copy, or a head."""
        if not step.linears:
            return self._copied(number, step)
        linears = tuple(
            self._linear(name, self.source.read(f"{name}.weight"), scheme)
            for name, scheme in step.linears.items()
        )
        block = Block(step.name, linears)
        codes = self.stages.quantize_apart(block)
        report = self.stages.report(block, codes, self._rewritten(step))
        self.announcer.block_done(step.name, report, block, codes)
        return number, self.stages.pack(codes, step, self.view.dtype), report

    def _linear(self, name: str, weight: Tensor, scheme: Scheme) -> Linear:
        return Linear(name, weight.to(self.device), scheme.weights, scheme.activations)

    def _copied(self, number: int, step: Step) -> Finished:
        """A step that has nothing to quantize."""
        contents = {name: self.source.tensors[name].chunks() for name in step.others}
        report = Report(rewritten=self._rewritten(step))
        self.announcer.block_done(step.name, report)
        return number, contents, report

    def _rewritten(self, step: Step) -> tuple[str, ...]:
        """The tensors of a step that the float model does not hold as they are."""
        names = [*(f"{name}.weight" for name in step.linears), *step.others]
        return rewritten_names(self.source, names)

    def calibrated(
        self, walk: Walk, output: SharedOutput, done: Collection[int]
    ) -> Iterator[Finished]:
        """Every step that is left, one decoder block at a time."""
        for number, step in enumerate(self.plan.steps):
            if step.name not in self.view.blocks:
                if number not in done:
                    yield self._apart(number, step)
                continue
            if number in done:
                walk.skip(step.name, self._served(step, output))
                continue
            with self.clock("statistics"):
                block = walk.gather(step.name)
            inputs = input_ranges(block)
            codes = self.stages.quantize(block)
            if self.stages.exporter.stores_float:
                block.clip()
            changed = {*block.rewritten(), *self._rewritten(step)}
            report = self.stages.report(block, codes, tuple(sorted(changed)), inputs)
            packed = self.stages.pack(codes, step, self.view.dtype)
            others = block.stored_floats(step.others)
            served = block.effective_parameters(codes, others, walk.dtype)
            self.announcer.block_done(step.name, report, block, codes)
            del block, codes  # on a GPU, the larger part of what it holds
            if not self.stages.exporter.exact:  # what it stores is not quite what the codes say
                served |= self._dequantized(step.linears, packed, step.name)
            with self.clock("passing on"):
                scales = walk.cache_scales(step.name, served)
                walk.advance(step.name, served | scales)
            del served
            # Old checkpoints have tensors in their blocks that are no parameters: masks, tables.
            kept = {n: self.source.tensors[n].chunks() for n in step.others if n not in others}
            cached = {f"{step.name}.{local}": scale for local, scale in scales.items()}
            yield number, {**packed, **others, **kept, **cached}, report

    def _dequantized(
        self, linears: Mapping[str, Scheme], tensors: Mapping[str, Tensor], block: str
    ) -> dict[str, Tensor]:
        """The weights that packed ``tensors`` (by full name) stand for, by name in the block.

        Beside them the scales of static inputs.
        """
        weights = {}
        stored = by_module(tensors)
        for name, scheme in linears.items():
            packed = {n: tensors[f"{name}.{n}"] for n in stored.get(name, ()) if n != "bias"}
            local = relative_name(block, name)
            weights[f"{local}.weight"] = self.stages.exporter.dequantize(packed, scheme)
            scale = self.stages.exporter.input_scale(packed)
            if scale is not None:
                weights[f"{local}.input_scale"] = scale
        return weights

    def _served(self, step: Step, output: SharedOutput) -> dict[str, Tensor]:
        """What an earlier run wrote of a block, as an engine will compute with it."""
        kept = (*step.others, *step.cache_scales)
        modules = dict.fromkeys([*step.linears, *(module_of(name) for name in kept)])
        stored = output.stored(modules)
        tensors = {
            f"{name}.{local}": tensor
            for name in step.linears
            for local, tensor in stored[name].items()
        }
        served = self._dequantized(step.linears, tensors, step.name)
        for name in kept:
            path, local = split_name(name)
            served[relative_name(step.name, name)] = stored[path][local]
        return served
