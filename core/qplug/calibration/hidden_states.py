"""The hidden states of all calibration tokens, between two blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class HiddenStates:
    """Batches, ``[samples, tokens, width]`` in most models, kept in the memory of the host.

    They are the largest tensors of a calibrated run: 2 GiB for 128 x 2048 tokens of width 4096.
    A GPU holds the batch that it works on and the next one, which is copied meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: list[Tensor] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        """Yields all batches, on the device."""
        return self.at(range(len(self)))

    def at(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yields the batches at ``indices``, on the device."""
        if self._copies is None:
            yield from (self._batches[index] for index in indices)
            return
        coming = [self._fetch(index, self._copies) for index in indices[:1]]
        for place in range(len(indices)):
            batch, ready = coming.pop()
            if place + 1 < len(indices):
                coming.append(self._fetch(indices[place + 1], self._copies))
            here = torch.cuda.current_stream(self._device)
            here.wait_event(ready)
            batch.record_stream(here)
            yield batch

    def append(self, batch: Tensor) -> None:
        """Add a batch that is on the device."""
        if self._copies is None:
            self._batches.append(batch)
            return
        self._batches.append(torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True))
        self.put(len(self) - 1, batch)

    def put(self, index: int, batch: Tensor) -> None:
        """Replace batch ``index`` by ``batch``, which is on the device."""
        if self._copies is None:
            self._batches[index] = batch
            return
        old = self._batches[index]
        if (old.shape, old.dtype) != (batch.shape, batch.dtype):
            self._batches[index] = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            self._batches[index].copy_(batch, non_blocking=True)
        batch.record_stream(self._copies)

    def _fetch(self, index: int, copies: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            batch = self._batches[index].to(self._device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(copies)
        return batch, ready
