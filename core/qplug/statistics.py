"""What calibration keeps of the tensors that linears read: sums over tokens, never the tokens."""

from __future__ import annotations

from collections.abc import Sequence

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


def share(statistics: Sequence[Statistics], processes: Processes) -> None:
    """Give all processes what each has seen of its tokens: then they have the same statistics."""
    seen = processes.gather([(each.tokens, each._kept) for each in statistics])
    for number, each in enumerate(statistics):
        each.tokens = sum(told[number][0] for told in seen)
        each._kept = [rows for told in seen for rows in told[number][1]]
    processes.reduce(
        sums=[total for each in statistics for total in (each.gram, each.total, each.absolute)],
        least=[each.low for each in statistics],
        most=[each.high for each in statistics],
    )


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """``gram += xᵀx``, summed in float32."""
    if x.is_cuda and x.dtype != torch.float32:
        # Products of half-precision numbers are exact in float32: nothing is lost but time saved.
        gram += torch.mm(x.T, x, out_dtype=torch.float32)
    else:
        gram.addmm_(x.T.float(), x.float())
