"""Extremes and sums of each channel over many rows, of one tensor or of several in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qplug.numerics.alike import together

#: Values that a CPU works on at a time, so that they stay in the cache of a core.
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Channels:
    """Extremes and sums over the rows ``x`` of ``n`` tensors, updated in place.

    ``low`` and ``high``, float32 ``[n, in]``, are the least and the greatest ``x``, infinite before
    the first row. ``total`` and ``absolute``, float64 ``[n, in]``, are sums of ``x`` and ``|x|``.
    """

    low: Tensor
    high: Tensor
    total: Tensor
    absolute: Tensor

    @classmethod
    def of_no_rows(cls, tensors: int, width: int, device: torch.device) -> Channels:
        """Those of ``tensors`` tensors of ``width`` channels, before any row was added."""
        shape = (tensors, width)
        return cls(
            torch.full(shape, torch.inf, device=device),
            torch.full(shape, -torch.inf, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
        )

    @classmethod
    def joined(cls, neighbours: Sequence[Channels]) -> Channels:
        """A view of ``neighbours``, which ``one`` made of the same Channels, in order.

        Raises ValueError if they do not follow one another in memory.
        """
        by_kind = zip(*map(_parts, neighbours), strict=True)
        joined = cls(*(together(parts).flatten(0, 1) for parts in by_kind))
        if joined.low.data_ptr() != neighbours[0].low.data_ptr():
            raise ValueError("channels that are joined must follow one another in memory")
        return joined

    def one(self, number: int) -> Channels:
        """A view of those of one tensor: ``n`` is 1."""
        return Channels(*(part[number : number + 1] for part in _parts(self)))

    def add(self, x: Tensor, starts: Tensor | None = None) -> None:
        """Adds the rows of ``x: [rows, in]``.

        ``starts``, int64 ``[n + 1]``, are the first row of each tensor and the number of all rows;
        only a GPU takes them. Without them all rows belong to the only tensor.
        """
        if not x.numel():
            return
        if x.is_cuda:
            from qplug.calibration.channels_kernel import add_on_gpu

            add_on_gpu(x, starts, self.low, self.high, self.total, self.absolute)
            return
        assert starts is None
        for rows in x.split(max(1, _CHUNK // x.shape[1])):
            self._add_on_cpu(rows)

    def widen(self, x: Tensor) -> None:
        """Makes the extremes of the only tensor cover ``x: [rows, in]``, but adds no sums."""
        if len(x):
            low, high = torch.aminmax(x, dim=0)
            torch.minimum(self.low[0], low.float(), out=self.low[0])
            torch.maximum(self.high[0], high.float(), out=self.high[0])

    def _add_on_cpu(self, x: Tensor) -> None:
        """Adds a few rows of the only tensor. NumPy's extremes are twenty times as fast."""
        rows = x.float()
        torch.minimum(self.low[0], torch.from_numpy(rows.numpy().min(0)), out=self.low[0])
        torch.maximum(self.high[0], torch.from_numpy(rows.numpy().max(0)), out=self.high[0])
        self.total[0] += rows.sum(0)
        self.absolute[0] += rows.abs().sum(0)


def _parts(channels: Channels) -> tuple[Tensor, ...]:
    return channels.low, channels.high, channels.total, channels.absolute
