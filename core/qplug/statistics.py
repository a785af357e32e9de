"""What calibration keeps of the tensors that linears read: sums over tokens, never the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from qplug.processes import Processes


class Statistics:
    """Running sums over the rows of ``x: [tokens, in]``; ``sample`` keeps a few rows themselves."""

    def __init__(self, width: int, device: torch.device, sample: int) -> None:
        self.tokens = 0
        self.gram = torch.zeros(width, width, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.absolute = torch.zeros(width, dtype=torch.float64, device=device)
        self.low = torch.full((width,), torch.inf, device=device)
        self.high = torch.full((width,), -torch.inf, device=device)
        self._room = sample
        self._kept: list[Tensor] = []

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

    def join(self, processes: Processes) -> None:
        """Take in what all other processes have seen: then each has the same."""
        seen = processes.gather((self.tokens, self._kept))
        self.tokens = sum(tokens for tokens, _ in seen)
        self._kept = [rows for _, kept in seen for rows in kept]
        sums = [self.gram, self.total, self.absolute]
        processes.reduce(sums=sums, least=[self.low], most=[self.high])

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
        return torch.cat(self._kept) if self._kept else self.gram[:0]


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """``gram += xᵀx``, summed in float32."""
    if x.is_cuda and x.dtype != torch.float32:
        # Products of half-precision numbers are exact in float32: nothing is lost but time saved.
        gram += torch.mm(x.T, x, out_dtype=torch.float32)
    else:
        gram.addmm_(x.T.float(), x.float())
