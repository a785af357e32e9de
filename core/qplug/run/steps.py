"""The steps of a run, and what those become that need no calibration data."""

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

#: How the codes of a block are found: those of each linear, by name.
Quantize = Callable[[Block], Mapping[str, QuantizedWeight]]


@dataclass(frozen=True, eq=False)
class Finished:
    """A computed step: its number, the tensors to write, and the report to leave in the journal."""

    number: int
    contents: Mapping[str, Content]
    report: Report


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of ``plan``, which ``stages`` make of the model that is ``prepared``."""

    stages: Stages
    plan: Plan
    prepared: Prepared
    watchers: Watchers
    session: Session

    def weights(self, step: Step) -> list[Tensor]:
        """Read the weights of the linears of ``step``, ``[out, in]`` each, in their order."""
        return [self.prepared.checkpoint.read(f"{name}.weight") for name in step.linears]

    def quantized(self, number: int, weights: Sequence[Tensor], quantize: Quantize) -> Finished:
        """Quantize ``weights``, those of the linears of step ``number``, without statistics."""
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
        """Copy the tensors of step ``number``, which has nothing to quantize."""
        step = self.plan.steps[number]
        report = Report(rewritten=self.rewritten(step))
        self.watchers.block_done(step.name, report)
        return Finished(number, self.copies(step.others), report)

    def copies(self, names: Sequence[str]) -> dict[str, Content]:
        """The bytes of tensors that the result has as the prepared model has them."""
        return {name: self.prepared.checkpoint.tensors[name].chunks() for name in names}

    def rewritten(self, step: Step) -> tuple[str, ...]:
        """The tensors of ``step`` that preparation made anew."""
        names = [*(f"{name}.weight" for name in step.linears), *step.others]
        return rewritten_names(self.prepared.checkpoint, names)
