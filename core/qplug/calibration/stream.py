"""All calibration batches on their way through one model, which stop at the same block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qplug.calibration.hidden_states import HiddenStates
from qplug.calibration.shared_tensors import SharedTensors
from qplug.calibration.stopped_pass import Stop, StoppedPass
from qplug.errors import QplugError
from qplug.model.block_call import BlockCall, Output

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Computes a block once more with the parameters of the last time.
Compute = Callable[[BlockCall], Output]


class Stream:
    """The batches of a model before one of its blocks.

    ``hidden``: the hidden states that enter the block; ``calls``: its other arguments, by batch.
    """

    def __init__(self, passes: Sequence[StoppedPass], device: torch.device) -> None:
        """Starts all ``passes``, up to the first block."""
        self._passes, self._device = passes, device
        self._at: list[str | None] = []  # the names of the blocks
        self._next_at: list[str | None] = []
        self.hidden, self.calls = HiddenStates(device), list[BlockCall]()
        self._next_hidden, self._next_calls = HiddenStates(device), list[BlockCall]()
        shared = SharedTensors()
        for one in passes:
            stop = one.start()
            self._at.append(None if stop is None else stop.block)
            if stop is not None:
                shared.share(stop.call.others())
                self.hidden.append(stop.call.hidden)
                self.calls.append(self._released(stop.call))

    def __len__(self) -> int:
        return len(self._passes)

    def expect(self, block: str) -> None:
        """Raises QplugError if ``block`` is not the block at which all batches wait."""
        for at in self._at:
            if at != block:
                where = "computes no more block" if at is None else f"computes {at}"
                raise QplugError(
                    f"{block}: the model {where} in its place on calibration data, so qplug cannot "
                    "follow; take an algorithm that needs no calibration data"
                )

    def __iter__(self) -> Iterator[BlockCall]:
        """Yields the call of the block for each batch, on the device."""
        for hidden, call in zip(self.hidden, self.calls, strict=True):
            yield call.with_hidden(hidden)

    def replace(self, index: int, call: BlockCall, output: Output, again: Compute) -> None:
        """Goes on with batch ``index``: what enters the next block replaces what entered this one.

        ``call`` as this stream yielded it; ``output``: what the block returned; ``again`` computes
        the block if the model calls it several times in a row.
        """
        stop = self._go_on(index, call, output, again)
        self._at[index] = None if stop is None else stop.block
        if stop is not None:
            self.hidden.put(index, stop.call.hidden)
            self.calls[index] = self._released(stop.call)

    def append(self, index: int, call: BlockCall, output: Output, again: Compute) -> None:
        """Like ``replace``, but what entered this block stays, until ``step``.

        Batches must come in order.
        """
        stop = self._go_on(index, call, output, again)
        if call.hidden.is_cuda:  # else the call would keep it in the memory of the GPU
            self.calls[index] = call.with_hidden(call.hidden.new_empty(0))
        self._next_at.append(None if stop is None else stop.block)
        if stop is not None:
            self._next_hidden.append(stop.call.hidden)
            self._next_calls.append(self._released(stop.call))

    def step(self) -> None:
        """Goes to the next block with all batches that have been appended."""
        self._at, self.hidden, self.calls = self._next_at, self._next_hidden, self._next_calls
        self._next_at, self._next_hidden = [], HiddenStates(self._device)
        self._next_calls = []

    def close(self) -> None:
        """Ends all passes where they stand."""
        for one in self._passes:
            one.abandon()
        self.hidden, self.calls = HiddenStates(self._device), []

    def _go_on(self, index: int, call: BlockCall, output: Output, again: Compute) -> Stop | None:
        block = self._at[index]
        self._restore(index, call.hidden)
        stop = self._passes[index].go_on(output)
        while stop is not None and stop.block == block:
            stop = self._passes[index].go_on(again(stop.call))
        return stop

    def _released(self, call: BlockCall) -> BlockCall:
        """``call``, whose hidden states take no memory of a GPU if nothing else shares them.

        The model's own frames refer to the tensor, so its memory is taken and not the tensor.
        """
        hidden = call.hidden
        if hidden.is_cuda:
            storage = hidden.untyped_storage().data_ptr()
            if all(other.untyped_storage().data_ptr() != storage for other in call.others()):
                hidden.data = hidden.new_empty(0)
        return call

    def _restore(self, index: int, hidden: Tensor) -> None:
        """Gives the model its hidden states back, before it runs on."""
        own = self.calls[index].hidden
        if own is not hidden:
            own.data = hidden
