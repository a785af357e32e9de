"""Computes the steps of a run that need no calibration data, and the tensors that are copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qplug.api import Block, Linear, QuantizedWeight
from qplug.checkpoint.rewritten import rewritten_names
from qplug.machine.session import Session
from qplug.output.plan import Plan, Step
from qplug.output.step_report import Report
from qplug.output.writer import Content
from qplug.run.prepare import Prepared
from qplug.run.stages import Stages
from qplug.run.watchers import Watchers

if TYPE_CHECKING:
    from torch import Tensor

#: A function that returns the codes of a block, by linear.
Quantize = Callable[[Block], Mapping[str, QuantizedWeight]]


@dataclass(frozen=True, eq=False)
class Finished:
    """A computed step: its number, the tensors to write by full name, and its report."""

    number: int
    contents: Mapping[str, Content]
    report: Report


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of ``plan``, which ``stages`` compute from the ``prepared`` model."""

    stages: Stages
    plan: Plan
    prepared: Prepared
    watchers: Watchers
    session: Session

    def weights(self, step: Step) -> list[Tensor]:
        """Returns the weights ``[out, in]`` of the linears in ``step``, in their order."""
        return [self.prepared.checkpoint.read(f"{name}.weight") for name in step.linears]

    def quantized(self, number: int, weights: Sequence[Tensor], quantize: Quantize) -> Finished:
        """Quantizes step ``number`` without statistics; ``weights`` are those of its linears."""
        step = self.plan.steps[number]
        linears = tuple(
            Linear(name, weight.to(self.session.device), scheme.weights, scheme.activations)
            for weight, (name, scheme) in zip(weights, step.linears.items(), strict=True)
        )
        block = Block(step.name, linears)
        codes = quantize(block)
        report = self.stages.report(block, codes, self.rewritten(step))
        self.watchers.block_done(step.name, report, block, codes)
        return Finished(number, self.stages.pack(codes, step, self.prepared.view.dtype), report)

    def copied(self, number: int) -> Finished:
        """Copies the tensors of step ``number``, which has no linears to quantize."""
        step = self.plan.steps[number]
        report = Report(rewritten=self.rewritten(step))
        self.watchers.block_done(step.name, report)
        return Finished(number, self.copies(step.others), report)

    def copies(self, names: Sequence[str]) -> dict[str, Content]:
        """Returns the bytes of tensors of the prepared model, by full name, to be written as is."""
        return {name: self.prepared.checkpoint.tensors[name].chunks() for name in names}

    def rewritten(self, step: Step) -> tuple[str, ...]:
        """Returns the names of the tensors in ``step`` that preparation rewrote."""
        names = [*(f"{name}.weight" for name in step.linears), *step.others]
        return rewritten_names(self.prepared.checkpoint, names)
