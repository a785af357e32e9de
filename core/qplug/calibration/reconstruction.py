"""A live block computed with other parameters, in float32 and with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qplug.api import Aim, Batch, InputGroup, Reconstruction
from qplug.calibration.hidden_states import HiddenStates
from qplug.checkpoint.names import relative_name
from qplug.machine.processes import Processes
from qplug.model.block_call import BlockCall, hidden_states
from qplug.model.input_groups import divided
from qplug.model.rounding_hooks import InputRounding, rounding_inputs
from qplug.numerics.straight_through import round_inputs

if TYPE_CHECKING:
    from qplug.calibration.live_block import LiveBlock


@dataclass(frozen=True, eq=False)
class Data:
    """One process's part of the calibration data at a block, by batch.

    ``inputs`` enter the block; ``targets`` leave the float model's block; ``calls`` have the
    block's other arguments; ``counted`` is ``real`` of ``Batch``. ``tokens`` counts these tokens
    of all processes, also in batches that this process has no part of.
    """

    inputs: HiddenStates
    targets: HiddenStates
    calls: Sequence[BlockCall]
    counted: Sequence[Tensor | None]
    tokens: Sequence[int]


@dataclass(frozen=True, eq=False)
class _LiveBatch(Batch):
    """A batch with the other arguments of the block."""

    call: BlockCall


class LiveReconstruction(Reconstruction):
    """The reconstruction of ``block``, whose ``module`` has no parameters of its own."""

    def __init__(
        self,
        block: LiveBlock,
        module: nn.Module,
        data: Data,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self._block, self._module, self._data = block, module, data
        self._device, self._processes = device, processes
        self.steps = len(data.tokens)
        self._targets: dict[Aim, HiddenStates] = {"model": data.targets}

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {self._full(local): weight for local, weight in self._block.weights32.items()}

    def batches(self, aim: Aim = "model", among: Sequence[int] | None = None) -> Iterator[Batch]:
        if aim not in self._targets:
            self._targets[aim] = self._float_outputs(averaged=aim == "both")
        wanted = range(self.steps) if among is None else among
        mine = [number for number in wanted if number < len(self._data.inputs)]
        inputs, targets = self._data.inputs.at(mine), self._targets[aim].at(mine)
        for number in wanted:
            tokens = self._data.tokens[number]
            if number < len(self._data.inputs):
                real = self._data.counted[number]
                real = None if real is None else real.to(self._device)
                call = self._data.calls[number]
                yield _LiveBatch(next(inputs).float(), next(targets), real, tokens, call)
            else:
                first = next(iter(self._data.inputs)).float()
                no_token = torch.zeros(first.shape[:2], dtype=torch.bool, device=self._device)
                yield _LiveBatch(first, first, no_token, tokens, self._data.calls[0])

    @torch.no_grad()
    def _float_outputs(self, *, averaged: bool) -> HiddenStates:
        """The float block's outputs for this block's inputs.

        ``averaged`` takes the mean of these outputs and the float model's.
        """
        outputs = HiddenStates(self._device)
        mine = range(len(self._data.inputs))
        originals = {f"{name}.weight": w for name, w in self._block.originals.items()}
        for batch in self.batches("model", mine):
            output = self.compute(originals, batch, rounding=False)
            if averaged:
                output = (output + batch.target.float()) / 2
            outputs.append(output.to(batch.target.dtype))
        return outputs

    def compute(
        self, values: Mapping[str, Tensor], batch: Batch, *, rounding: bool = True
    ) -> Tensor:
        assert isinstance(batch, _LiveBatch)
        block = self._block.name
        parameters = dict(self._block.weights32)
        parameters.update({relative_name(block, name): value for name, value in values.items()})
        call = batch.call.in_float32().with_hidden(batch.inputs)
        roundings = {
            relative_name(block, linear.name): InputRounding(linear.activations, linear.input_scale)
            for linear in self._block.linears
            if rounding and linear.activations is not None
        }
        with rounding_inputs(self._module, roundings, round_inputs):
            return hidden_states(call.run(self._module, parameters))

    def smoothed(
        self, values: Mapping[str, Tensor], group: InputGroup, scale: Tensor
    ) -> dict[str, Tensor]:
        producer, readers = self._block.producer_and_readers(group)
        weight = self._full(f"{producer.module}.weight")
        bias = self._full(f"{producer.module}.bias")
        smoothed = dict(values)
        smoothed[weight], new_bias = divided(values[weight], values.get(bias), producer, scale)
        if new_bias is not None:
            smoothed[bias] = new_bias
        for path in readers:
            name = self._full(f"{path}.weight")
            smoothed[name] = smoothed[name] * scale
        return smoothed

    def shifted(
        self, values: Mapping[str, Tensor], group: InputGroup, offset: Tensor
    ) -> dict[str, Tensor]:
        producer, readers = self._block.producer_and_readers(group)
        shifted = dict(values)
        bias = self._full(f"{producer.module}.bias")
        shifted[bias] = values[bias] - offset
        for path in readers:
            weight, bias = (self._full(f"{path}.{local}") for local in ("weight", "bias"))
            shifted[bias] = values[bias] + values[weight] @ offset
        return shifted

    def total(self, tensors: Sequence[Tensor]) -> None:
        if self._processes.count > 1:
            self._processes.reduce(sums=tensors)

    def _full(self, local: str) -> str:
        return f"{self._block.name}.{local}"
