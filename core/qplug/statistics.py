"""What calibration keeps of the tensors that linears read: sums over tokens, never the tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class Statistics:
    """Running sums over the rows of ``x: [tokens, in]``; ``sample`` keeps a few rows themselves.

    ``by_window`` keeps the extremes of each window of tokens too.
    """

    def __init__(
        self, width: int, device: torch.device, sample: int, *, by_window: bool = False
    ) -> None:
        self.tokens = 0
        self.gram = torch.zeros(width, width, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.absolute = torch.zeros(width, dtype=torch.float64, device=device)
        self.low = torch.full((width,), torch.inf, device=device)
        self.high = torch.full((width,), -torch.inf, device=device)
        self._room = sample
        self._kept: list[Tensor] = []
        self._lows: list[Tensor] | None = [] if by_window else None
        self._highs: list[Tensor] = []

    def observe_windows(self, x: Tensor, share: int, length: int) -> None:
        """``observe`` ``x: [..., in]``, rows of windows of ``length`` tokens, one after the other.

        However many come in one call, the extremes of each are kept apart; but rows that make no
        whole windows, as those that are routed to an expert, count as one.
        """
        rows = x.flatten(0, -2)
        if self._lows is not None and len(rows):
            whole = length if len(rows) % length == 0 else len(rows)
            low, high = torch.aminmax(rows.unflatten(0, (-1, whole)), dim=1)
            self._lows.append(low.float())
            self._highs.append(high.float())
        self.observe(rows, share)

    def observe(self, x: Tensor, share: int) -> None:
        """Take in ``x: [tokens, in]``; at most ``share`` of its rows go into the sample."""
        self.tokens += x.shape[0]
        _add_gram(self.gram, x)
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

    @property
    def mean(self) -> Tensor:
        """The mean of ``x``, float32 ``[in]``."""
        return (self.total / max(1, self.tokens)).float()

    @property
    def mean_abs(self) -> Tensor:
        """The mean of ``|x|``, float32 ``[in]``."""
        return (self.absolute / max(1, self.tokens)).float()

    @property
    def lows(self) -> Tensor | None:
        """The least ``x`` of each channel in each window, float32 ``[windows, in]``, if kept."""
        return torch.cat(self._lows) if self._lows else None

    @property
    def highs(self) -> Tensor | None:
        """The greatest, likewise."""
        return torch.cat(self._highs) if self._highs else None

    @property
    def sample(self) -> Tensor:
        """Some of the rows, float32."""
        return torch.cat(self._kept) if self._kept else self.gram[:0]


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """``gram += xᵀx``, summed in float32."""
    if x.is_cuda and x.dtype != torch.float32:
        # Products of half-precision numbers are exact in float32: nothing is lost but time saved.
        gram += torch.mm(x.T, x, out_dtype=torch.float32)
    else:
        gram.addmm_(x.T.float(), x.float())
