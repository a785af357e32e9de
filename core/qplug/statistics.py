"""What calibration keeps of the tensors that linears read: sums over tokens, never the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

#: Values of ``x`` that a CPU gathers in float32 before it multiplies them: a product of many rows
#: writes the whole of ``G`` once for all of them.
_ROOM = 1 << 24
_MOST_ROWS = 4096
#: Values worked on at a time, so that they stay in a core's cache.
_CHUNK = 1 << 18
#: Rows of ``G`` made at a time: what is left of the diagonal is not computed but mirrored.
_PANEL = 1024


class Statistics:
    """Running sums over the rows of ``x: [tokens, in]``; ``sample`` keeps a few rows themselves."""

    def __init__(self, width: int, device: torch.device, sample: int) -> None:
        self.tokens = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.absolute = torch.zeros(width, dtype=torch.float64, device=device)
        self.low = torch.full((width,), torch.inf, device=device)
        self.high = torch.full((width,), -torch.inf, device=device)
        self._gram = torch.zeros(width, width, device=device)
        self._waiting = torch.empty(0, width)  # float32, on a CPU: rows that are not in _gram yet
        self._filled = 0
        self._room = sample
        self._kept: list[Tensor] = []

    def observe(self, x: Tensor, share: int) -> None:
        """Take in ``x: [tokens, in]``; at most ``share`` of its rows go into the sample."""
        self.tokens += x.shape[0]
        if x.device.type == "cpu":
            self._gather(x)
        else:
            _add_gram(self._gram, x)
            low, high = torch.aminmax(x, dim=0)
            torch.minimum(self.low, low.float(), out=self.low)
            torch.maximum(self.high, high.float(), out=self.high)
            self.total += x.sum(0, dtype=torch.float32)
            self.absolute += x.abs().sum(0, dtype=torch.float32)
        count = min(share, self._room, x.shape[0])
        if count:
            even = torch.arange(count, device=x.device) * x.shape[0] // count
            self._kept.append(x[even].float())
            self._room -= count

    def _gather(self, x: Tensor) -> None:
        """Sums of ``x: [tokens, in]``, in passes over parts that a cache holds; ``G`` later."""
        width = x.shape[1]
        if not len(self._waiting):
            self._waiting = torch.empty(max(1, min(_MOST_ROWS, _ROOM // width)), width)
        step = max(1, _CHUNK // width)
        while len(x):
            count = min(step, len(x), len(self._waiting) - self._filled)
            rows = self._waiting[self._filled : self._filled + count].copy_(x[:count])
            # NumPy's extremes over rows take a twentieth of the time of torch's.
            torch.minimum(self.low, torch.from_numpy(rows.numpy().min(0)), out=self.low)
            torch.maximum(self.high, torch.from_numpy(rows.numpy().max(0)), out=self.high)
            self.total += rows.sum(0)
            self.absolute += rows.abs().sum(0)
            self._filled += count
            if self._filled == len(self._waiting):
                self._multiply()
            x = x[count:]

    def _multiply(self) -> None:
        _add_gram_on_cpu(self._gram, self._waiting[: self._filled])
        self._filled = 0

    @property
    def gram(self) -> Tensor:
        """The sum of ``xᵀx``, float32 ``[in, in]``: always the same tensor, brought up to date."""
        if self._filled:
            self._multiply()
        return self._gram

    @property
    def mean(self) -> Tensor:
        """The mean of ``x``, float32 ``[in]``."""
        return (self.total / max(1, self.tokens)).float()

    @property
    def mean_abs(self) -> Tensor:
        """The mean of ``|x|``, float32 ``[in]``."""
        return (self.absolute / max(1, self.tokens)).float()

    @property
    def sample(self) -> Tensor:
        """Some of the rows, float32."""
        return torch.cat(self._kept) if self._kept else self._gram[:0]


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """``gram += xᵀx``, summed in float32."""
    if x.dtype != torch.float32:
        # Products of half-precision numbers are exact in float32: nothing is lost but time saved.
        gram += torch.mm(x.T, x, out_dtype=torch.float32)
    else:
        gram.addmm_(x.T, x)


def _add_gram_on_cpu(gram: Tensor, x: Tensor) -> None:
    """``gram += xᵀx`` for float32 ``x``, with half of the products: ``gram`` is symmetric.

    NumPy computes a matrix times its own transpose by BLAS's syrk, which torch does not call.
    """
    sums, rows = gram.numpy(), x.numpy()  # the same memory
    for start in range(0, rows.shape[1], _PANEL):
        stop = start + _PANEL
        panel = rows[:, start:stop]
        sums[start:stop, start:stop] += panel.T @ panel
        beside = panel.T @ rows[:, stop:]
        sums[start:stop, stop:] += beside
        sums[stop:, start:stop] += beside.T
