"""Passes of tokens through the float model, forwards and backwards, one block in memory at a time.

The weights of a block are in memory only while it computes, and all batches pass it together. The
hidden states that entered the blocks are kept in the memory of the host, so that a pass backwards
computes each block once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from qplug.api import ModelView
from qplug.api.tensors import Checkpoint
from qplug.calibration.hidden_states import HiddenStates
from qplug.calibration.samples import Samples
from qplug.calibration.stopped_pass import StoppedPass, StoppingBlocks
from qplug.calibration.stream import Stream
from qplug.checkpoint.names import is_within, module_of, relative_name, split_name
from qplug.errors import QplugError
from qplug.machine.memory import free_memory
from qplug.machine.session import Session
from qplug.model.block_call import BlockCall, Output, hidden_states
from qplug.model.block_list import decoder_blocks
from qplug.model.block_proxy import BlockProxy
from qplug.model.disk_names import disk_names, tied_name
from qplug.model.hollow import build, load_config
from qplug.model.hooks import hooked
from qplug.model.on_disk import as_on_disk
from qplug.model.online_rotation import rotate_inputs
from qplug.model.parameters import set_parameter
from qplug.model.rounding_hooks import InputRounding, rounding_inputs

#: The hidden states of a pass backwards take one part of so many of the free memory.
_SHARE = 4


@dataclass(frozen=True, eq=False)
class Passed:
    """What went through a linear in a pass back: a row for each token.

    ``x`` is its input, float32 ``[tokens, in]``, and ``gradient`` the gradient of the loss by its
    output, float32 ``[tokens, out]``. ``weight`` is float32 ``[out, in]``.
    """

    x: Tensor
    gradient: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Variant:
    """Other weights for linears of one block, float32 ``[out, in]``, and how inputs are rounded.

    Both are by the name of the linear.
    """

    weights: Mapping[str, Tensor]
    inputs: Mapping[str, InputRounding] = field(default_factory=dict)


class FloatPasses:
    """Passes through the float model ``source``; it computes in float32 on the session's device."""

    def __init__(
        self, source: Checkpoint, view: ModelView, online: Sequence[str], session: Session
    ) -> None:
        """``online``: the linears whose inputs are rotated as the model runs."""
        self.device, trusted = session.device, session.trust_remote_code
        config = load_config(source.folder, trust_remote_code=trusted)
        self._model: Any = build(config, source.folder, trust_remote_code=trusted).eval()
        names = disk_names(self._model, source.tensors)
        in_memory = decoder_blocks(self._model, source.folder)
        blocks = as_on_disk(self._model, view.blocks, source.tensors, names, shapes=source.shapes)
        self.blocks: list[_Block] = []
        for (name, module), path in zip(blocks.items(), in_memory, strict=True):
            rotated = [relative_name(name, n) for n in online if is_within(name, n)]
            rotate_inputs(dict(module.named_modules()), rotated)
            block = _Block(name, module, source, self.device)
            parent, local = split_name(path)
            setattr(self._model.get_submodule(parent), local, block)
            self.blocks.append(block)
        for name, _ in list(self._model.named_parameters()):
            on_disk = names.of_parameter.get(name) or (
                f"{tied_name(self._model, module_of(name))}.weight"
            )
            if on_disk not in source.tensors:
                raise QplugError(f"{source.folder}: the checkpoint lacks {on_disk}")
            set_parameter(self._model, name, source.read(on_disk).float().to(self.device))
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self._model.tie_weights()

    def logits(self, samples: Samples) -> Tensor:
        """The float32 logits ``[samples, length, vocabulary]``; each block keeps its call."""
        for block in self.blocks:
            block.play = block.record
        return self._logits(samples, times=1)

    def logits_with(self, samples: Samples, number: int, variants: Sequence[Variant]) -> Tensor:
        """The logits of the model with each of ``variants`` of block ``number``, one after another.

        Float32 ``[variants * samples, length, vocabulary]``. ``logits`` of the same samples must
        have been called before: blocks before ``number`` are not computed again.
        """
        for place, block in enumerate(self.blocks):
            if place < number:
                block.play = partial(block.replay, len(variants))
            elif place == number:
                block.play = partial(block.vary, variants)
            else:
                block.play = block.compute
        with torch.no_grad():
            return self._logits(samples, times=len(variants))

    def backwards(
        self,
        batches: Sequence[Samples],
        loss: Callable[[Samples, Tensor], Tensor],
        visit: Callable[[str, Passed], None],
        watch: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Calls ``visit`` with what went through each linear, by full name, the last block first.

        ``loss`` makes a number of a batch and its logits ``[samples, length, vocabulary]``.
        ``visit`` is called for each batch; a linear through which nothing went is left out. Each
        block is read twice, or twice for each part of the batches if the host has not the memory
        for all. ``watch`` is called with the reads that are done, and with all of them. Raises
        QplugError if the model does not call its blocks one after another.
        """
        parts = self._parts(batches)
        done, total = count(1), 2 * len(self.blocks) * len(parts)
        for part in parts:
            self._backwards(part, loss, visit, lambda: watch(next(done), total))

    def peaks(self, batches: Sequence[Samples], linears: Collection[str]) -> dict[str, Tensor]:
        """The largest magnitude of what enters each of ``linears``, float32 ``[]``, by full name.

        All ``batches`` pass each block together, so that it is read once. A linear through which
        nothing went is left out. Raises QplugError if the model does not call its blocks one after
        another.
        """
        found: dict[str, Tensor] = {}
        stopping = StoppingBlocks(self._model, {})
        for block in self.blocks:
            block.play = partial(block.stop, stopping)
        begun = [stopping.begin(partial(self._logits, batch, times=1)) for batch in batches]
        with closing(Stream(begun, self.device)) as stream:
            for block in self.blocks:
                stream.expect(block.name)
                compute = partial(block.compute_with, block.parameters_of())
                for index, call in enumerate(stream):
                    with block.watching(linears, found):
                        output = compute(call)
                    if block is not self.blocks[-1]:
                        stream.replace(index, call, output, compute)
        return found

    def _parts(self, batches: Sequence[Samples]) -> list[Sequence[Samples]]:
        """``batches`` in parts whose hidden states take at most a quarter of the free memory."""
        free = free_memory(torch.device("cpu"))
        if not batches or free is None:
            return [batches]
        tokens = max(batch.tokens.numel() for batch in batches)
        width: int = self._model.config.get_text_config().hidden_size
        each = tokens * width * 4 * len(self.blocks)  # in float32
        together = max(1, free // _SHARE // each)
        return [batches[n : n + together] for n in range(0, len(batches), together)]

    def _backwards(
        self,
        batches: Sequence[Samples],
        loss: Callable[[Samples, Tensor], Tensor],
        visit: Callable[[str, Passed], None],
        watch: Callable[[], None],
    ) -> None:
        stopping = StoppingBlocks(self._model, {})
        for block in self.blocks:
            block.play = partial(block.stop, stopping)
        logits: dict[int, Tensor] = {}
        begun = [
            stopping.begin(partial(self._keep_logits, logits, index, batch))
            for index, batch in enumerate(batches)
        ]
        gradients: list[Tensor] = []
        entered: list[tuple[HiddenStates, list[BlockCall]]] = []
        with closing(Stream(begun, self.device)) as stream:
            for block in self.blocks:
                stream.expect(block.name)
                entered.append((stream.hidden, [call.apart() for call in stream.calls]))
                compute = partial(block.compute_with, block.parameters_of())
                for index, call in enumerate(stream):
                    output = compute(call)
                    states = hidden_states(output)
                    if block is self.blocks[-1]:
                        states = states.detach().requires_grad_()
                    stream.append(index, call, _with_states(output, states), compute)
                    if block is self.blocks[-1]:
                        (found,) = torch.autograd.grad(
                            loss(batches[index], logits.pop(index)), states
                        )
                        gradients.append(found.cpu())
                    del call, output, states
                stream.step()
                watch()
        for block in reversed(self.blocks):
            hidden, calls = entered.pop()
            values = block.parameters_of()
            for index, (states, call) in enumerate(zip(hidden, calls, strict=True)):
                gradient = gradients[index].to(self.device)
                found = block.backwards(call.with_hidden(states), values, gradient, visit)
                gradients[index] = found.cpu()
            watch()

    @torch.enable_grad()
    def _keep_logits(self, logits: dict[int, Tensor], index: int, batch: Samples) -> None:
        logits[index] = self._logits(batch, times=1)

    def _logits(self, samples: Samples, *, times: int) -> Tensor:
        inputs = {name: x.to(self.device) for name, x in samples.inputs(torch.float32).items()}
        repeated = {name: x.repeat(times, *[1] * (x.ndim - 1)) for name, x in inputs.items()}
        logits: Tensor = self._model(**repeated, use_cache=False).logits
        return logits.float()


class _Block(BlockProxy):
    """Stands for a decoder block; ``play`` says what a call of it does."""

    def __init__(
        self, name: str, block: nn.Module, source: Checkpoint, device: torch.device
    ) -> None:
        super().__init__(block)
        self.name, self._source, self._device = name, source, device
        self._names = [n for n in block.state_dict() if f"{name}.{n}" in source.tensors]
        self.play: Callable[[BlockCall], Output] = self.record
        self._call: BlockCall | None = None
        self._output: Output = None

    @property
    def module(self) -> nn.Module:
        """The block itself."""
        block: nn.Module = self.__dict__["block"]
        return block

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        """Does what ``play`` says."""
        return self.play(BlockCall.of(args, kwargs))

    def parameters_of(self, variant: Variant | None = None) -> dict[str, Tensor]:
        """The parameters of the block by relative name, with the weights of ``variant``."""
        values = {
            name: self._source.read(f"{self.name}.{name}").float().to(self._device)
            for name in self._names
        }
        if variant is not None:
            values |= {
                f"{relative_name(self.name, name)}.weight": weight
                for name, weight in variant.weights.items()
            }
        return values

    def stop(self, stopping: StoppingBlocks, call: BlockCall) -> Output:
        """Returns what the stopped pass that runs is given as the output of the block."""
        stopped: StoppedPass = stopping.current.stopped
        return stopped.wait_at(self.name, call)

    def compute(self, call: BlockCall) -> Output:
        """Computes the block, without gradients."""
        return self.compute_with(self.parameters_of(), call)

    @torch.no_grad()
    def compute_with(self, values: Mapping[str, Tensor], call: BlockCall) -> Output:
        """Computes the block with parameters ``values`` by relative name, without gradients."""
        return call.run(self.module, values)

    def record(self, call: BlockCall) -> Output:
        """Computes the block, and keeps the call and the output on the CPU."""
        self._call = call.with_hidden(call.hidden.detach().cpu()).apart()
        output = self.compute(call)
        self._output = hidden_states(output).cpu()
        return output

    def replay(self, times: int, call: BlockCall) -> Output:
        """Returns the hidden states that the block returned when it was recorded, repeated."""
        return self._output.to(self._device).repeat(times, *[1] * (self._output.ndim - 1))

    def vary(self, variants: Sequence[Variant], call: BlockCall) -> Output:
        """Computes the recorded call with each variant; returns all hidden states together."""
        return torch.cat([hidden_states(output) for output in self._varied(variants)])

    def _varied(self, variants: Sequence[Variant]) -> Iterator[Output]:
        for variant in variants:
            call = self._recorded().apart()
            inputs = {relative_name(self.name, n): how for n, how in variant.inputs.items()}
            with rounding_inputs(self.module, inputs):
                yield call.run(self.module, self.parameters_of(variant))

    @contextmanager
    def watching(self, linears: Collection[str], found: dict[str, Tensor]) -> Iterator[None]:
        """Notes in ``found`` the largest magnitude of what enters those of ``linears`` in it."""

        def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel():
                peak = inputs[0].detach().float().abs().amax()
                found[name] = torch.maximum(found.get(name, peak), peak)

        inside = {f"{self.name}.{local}": m for local, m in self.module.named_modules()}
        hooks = [
            inside[name].register_forward_pre_hook(partial(note, name))
            for name in linears
            if name in inside
        ]
        with hooked(hooks):
            yield

    def backwards(
        self,
        call: BlockCall,
        values: Mapping[str, Tensor],
        gradient: Tensor,
        visit: Callable[[str, Passed], None],
    ) -> Tensor:
        """Returns the gradient by what entered the block, of ``gradient`` by what left it.

        ``call`` is the call of the block, which computes with the parameters ``values``.
        """
        call = call.apart()
        entered = call.hidden.detach().requires_grad_()
        passed: list[tuple[str, Tensor, Tensor]] = []

        def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            passed.append((name, inputs[0], out))

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            linears = {n: m for n, m in self.module.named_modules() if isinstance(m, nn.Linear)}
            hooks = [m.register_forward_hook(partial(keep, n)) for n, m in linears.items()]
            stack.enter_context(hooked(hooks))
            output = hidden_states(call.with_hidden(entered).run(self.module, values))
        outputs = [out for _, _, out in passed]
        found = torch.autograd.grad(output, [entered, *outputs], gradient, allow_unused=True)
        for (name, x, _), by_output in zip(passed, found[1:], strict=True):
            weight = values.get(f"{name}.weight")
            if by_output is not None and weight is not None and len(x):
                visit(
                    f"{self.name}.{name}",
                    Passed(x.detach().flatten(0, -2), by_output.flatten(0, -2), weight),
                )
        assert found[0] is not None
        return found[0]

    def _recorded(self) -> BlockCall:
        assert self._call is not None
        return self._call.with_hidden(self._call.hidden.to(self._device))


def _with_states(output: Output, states: Tensor) -> Output:
    """``output`` of a block with other hidden states."""
    return states if isinstance(output, Tensor) else type(output)((states, *output[1:]))
