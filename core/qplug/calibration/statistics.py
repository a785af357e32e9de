"""What calibration keeps of the tensors that linears read: sums over tokens, never the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qplug.calibration.gram import MOST_ROWS, Gram
from qplug.machine.processes import Processes

#: Values worked on at a time on a CPU, so that they stay in a core's cache.
_CHUNK = 1 << 18


class Statistics:
    """Running sums over the rows of ``x: [tokens, in]``; ``sample`` keeps a few rows themselves.

    ``drift`` is the sum of ``xᵀ(y - x)`` and ``lag`` that of ``y - x``, where ``y`` is what the
    float model would have had in the place of ``x``; None unless ``with_drift``. ``by_window``
    keeps the extremes of each window of tokens too.
    """

    def __init__(
        self,
        width: int,
        device: torch.device,
        sample: int,
        *,
        by_window: bool = False,
        with_drift: bool = False,
        patience: int = MOST_ROWS,
    ) -> None:
        """``patience``: rows of ``x`` that a CPU may hold back, to multiply them at one go."""
        self.tokens = 0
        self._gram = Gram(width, device, patience)
        self.drift = torch.zeros(width, width, device=device) if with_drift else None
        self.lag = torch.zeros(width, device=device) if with_drift else None
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.absolute = torch.zeros(width, dtype=torch.float64, device=device)
        self.low = torch.full((width,), torch.inf, device=device)
        self.high = torch.full((width,), -torch.inf, device=device)
        self._room = sample
        self._kept: list[Tensor] = []
        self._by_window = by_window
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []

    def observe_windows(
        self,
        x: Tensor,
        share: int,
        length: int,
        real: Tensor | None = None,
        ideal: Tensor | None = None,
        rows: Tensor | None = None,
        ideal_rows: Tensor | None = None,
    ) -> None:
        """``observe`` ``x: [..., in]``, rows of windows of ``length`` tokens, one after the other.

        However many come in one call, the extremes of each are kept apart. Where ``real``, bool
        ``[windows, tokens]``, is false, a window has ended. ``rows``, int64 in order: the tokens
        that an expert was given, of all in the windows; ``ideal_rows`` those that it is given in
        the float model. Tokens that it has in only one of both have not drifted, but gone.
        """
        x = x.flatten(0, -2)
        tokens = torch.arange(len(x), device=x.device) if rows is None else rows
        ideal = None if ideal is None else ideal.flatten(0, -2)
        if real is not None:
            kept = real.flatten().to(x.device)[tokens]
            x, tokens = x[kept], tokens[kept]
            ideal = ideal[kept] if ideal is not None and ideal_rows is None else ideal
        if self._by_window and len(x):
            _, counts = torch.unique_consecutive(tokens // length, return_counts=True)
            windows = x.float().split(counts.tolist())
            self._lows.append(torch.stack([window.amin(0) for window in windows]))
            self._highs.append(torch.stack([window.amax(0) for window in windows]))
        if ideal is not None and ideal_rows is not None:
            both = torch.isin(tokens, ideal_rows), torch.isin(ideal_rows, tokens)
            self.compare(x[both[0]], ideal[both[1]])
            ideal = None
        self.observe(x, share, ideal)

    def observe(self, x: Tensor, share: int, ideal: Tensor | None = None) -> None:
        """Take in ``x: [tokens, in]``; at most ``share`` of its rows go into the sample.

        ``ideal: [tokens, in]``: the ``y`` of these rows.
        """
        if not len(x):
            return
        self.tokens += x.shape[0]
        self._gram.add(x)
        if ideal is not None:
            self.compare(x, ideal)
        if x.device.type == "cpu":
            for rows in x.split(max(1, _CHUNK // x.shape[1])):
                self._add_on_cpu(rows)
        else:
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
    def gram(self) -> Tensor:
        """The sum of ``xᵀx``, float32 ``[in, in]``."""
        return self._gram.value

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

    def _add_on_cpu(self, x: Tensor) -> None:
        """Sums and extremes of a few rows. NumPy's extremes take a twentieth of torch's time."""
        rows = x.float()
        torch.minimum(self.low, torch.from_numpy(rows.numpy().min(0)), out=self.low)
        torch.maximum(self.high, torch.from_numpy(rows.numpy().max(0)), out=self.high)
        self.total += rows.sum(0)
        self.absolute += rows.abs().sum(0)

    def compare(self, x: Tensor, ideal: Tensor) -> None:
        """Take in how far ``x: [tokens, in]`` is from ``ideal``, the ``y`` of these rows."""
        assert self.drift is not None
        assert self.lag is not None
        off = ideal.float() - x.float()
        self.lag += off.sum(0)
        if not x.is_cuda or x.dtype == torch.float32:
            self.drift.addmm_(x.T.float(), off)
        else:  # what is left of a difference of two numbers needs few digits
            self.drift += torch.mm(x.T, off.to(x.dtype), out_dtype=torch.float32)


def share(statistics: Sequence[Statistics], processes: Processes) -> None:
    """Give all processes what each has seen of its tokens: then they have the same statistics."""
    seen = processes.gather([(s.tokens, s._kept, s._lows, s._highs) for s in statistics])
    for number, each in enumerate(statistics):
        each.tokens = sum(told[number][0] for told in seen)
        each._kept = [rows for told in seen for rows in told[number][1]]
        each._lows = [rows for told in seen for rows in told[number][2]]
        each._highs = [rows for told in seen for rows in told[number][3]]
    sums = [total for each in statistics for total in (each.gram, each.total, each.absolute)]
    sums += [drift for each in statistics for drift in (each.drift, each.lag) if drift is not None]
    processes.reduce(
        sums=sums,
        least=[each.low for each in statistics],
        most=[each.high for each in statistics],
    )
