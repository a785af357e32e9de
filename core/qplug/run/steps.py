"""Computes the steps of a run that need no calibration data, and the tensors that are copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qplug.api import Block, Linear, QuantizedWeight, StoredTensor
from qplug.checkpoint.finite import Magnitudes
from qplug.checkpoint.into_memory import into_memory
from qplug.checkpoint.rewritten import rewritten_names
from qplug.checkpoint.stacked import stack
from qplug.checkpoint.tensor_file import tensor_bytes
from qplug.machine.session import Session
from qplug.model.parameters import refuse_infinite
from qplug.output.plan import Plan, Step
from qplug.output.step_report import Report
from qplug.output.writer import Content
from qplug.run.block_watch import BlockWatch
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
    """The steps of ``plan``, which ``stages`` compute from the ``prepared`` model.

    ``watch`` stops the run after a block that is too far from the float model's, or raises the
    block; None if nothing does.
    """

    stages: Stages
    plan: Plan
    prepared: Prepared
    watchers: Watchers
    session: Session
    watch: BlockWatch | None = None

    def stored_weights(self, step: Step) -> dict[str, StoredTensor]:
        """Returns the stored weights of the linears in ``step``, by full name, in their order."""
        names = [f"{name}.weight" for name in step.linears]
        return {name: self.prepared.checkpoint.tensors[name] for name in names}

    def weights(self, step: Step) -> dict[str, Tensor]:
        """Returns the weights ``[out, in]`` of the linears in ``step``, by full name, in order."""
        on_gpu = self.session.device.type == "cuda"
        return {
            name: into_memory(stored, page_locked=on_gpu)
            for name, stored in self.stored_weights(step).items()
        }

    def quantized(self, number: int, read: Mapping[str, Tensor], quantize: Quantize) -> Finished:
        """Quantizes step ``number`` without statistics; ``read`` are the weights that it reads."""
        step, dtype = self.plan.steps[number], self.prepared.view.dtype
        # torch computes nothing in fp8; bfloat16 holds each of its values.
        weights = [w.bfloat16() if w.element_size() == 1 else w for w in read.values()]
        if dtype == "float16":  # all other dtypes hold the weights of all checkpoints
            named = {f"{name}.weight": w for name, w in zip(step.linears, weights, strict=True)}
            refuse_infinite(named, dtype)
        linears = tuple(
            Linear(name, weight.to(self.session.device), scheme.weights, scheme.activations)
            for weight, (name, scheme) in zip(weights, step.linears.items(), strict=True)
        )
        block = Block(step.name, linears)
        codes = quantize(block)
        report = self.stages.report(block, codes, self.rewritten(step))
        self.watchers.block_done(step.name, report, block, codes)
        packed = self.stages.pack(codes, step, dtype)
        return self.finished(number, {**packed, **self.copies(step.others)}, report)

    def finished(self, number: int, contents: Mapping[str, Content], report: Report) -> Finished:
        """Returns step ``number`` with ``contents`` that are checked, at the latest as written.

        Raises QplugError, or makes the writer raise it, if a number to store is not finite, or
        overflows the dtype of the model.
        """
        step, dtype = self.plan.steps[number], self.prepared.view.dtype
        outputs, contents = step.outputs, self._stacked(step, self._transposed(step, contents))
        checked: dict[str, Content] = {}
        for name, content in contents.items():
            if name not in outputs:
                continue
            magnitudes = Magnitudes(name, outputs[name], dtype)
            if isinstance(content, torch.Tensor):
                magnitudes.refuse(tensor_bytes(content))
                checked[name] = content
            else:
                checked[name] = magnitudes.checked(content)
        return Finished(number, checked, report)

    def _stacked(self, step: Step, contents: Mapping[str, Content]) -> dict[str, Content]:
        """Returns ``contents`` with those tensors of experts joined that are stored together."""
        stored = dict(contents)
        for name, stacked in step.stacks.items():
            names = [member for of_expert in stacked.members for member in of_expert]
            values = {member: self._in_memory(member, stored.pop(member)) for member in names}
            stored[name] = stack(stacked, values)
        return stored

    def _transposed(self, step: Step, contents: Mapping[str, Content]) -> dict[str, Content]:
        """Returns ``contents`` with matrices as ``[in, out]`` that are stored so."""
        stored = dict(contents)
        for name in step.transposed & contents.keys():
            matrix = self._in_memory(name, stored[name]).to(
                getattr(torch, step.outputs[name].dtype)
            )
            stored[name] = matrix.T.contiguous().cpu()
        return stored

    def _in_memory(self, name: str, content: Content) -> Tensor:
        if isinstance(content, torch.Tensor):
            return content
        return self.prepared.checkpoint.read(name)

    def copied(self, number: int) -> Finished:
        """Copies the tensors of step ``number``, which has no linears to quantize."""
        step = self.plan.steps[number]
        report = Report(rewritten=self.rewritten(step))
        self.watchers.block_done(step.name, report)
        return self.finished(number, self.copies(step.others), report)

    def copies(self, names: Sequence[str]) -> dict[str, Content]:
        """Returns the bytes of tensors of the prepared model, by full name, to be written as is."""
        return {name: self.prepared.checkpoint.tensors[name].chunks() for name in names}

    def rewritten(self, step: Step) -> tuple[str, ...]:
        """Returns the names of the tensors in ``step`` that preparation rewrote."""
        names = [*(f"{name}.weight" for name in step.linears), *step.others]
        return rewritten_names(self.prepared.checkpoint, names)
