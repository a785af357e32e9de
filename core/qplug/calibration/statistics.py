"""Statistics of the tensors that linears read: sums over tokens, extremes, and a small sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from qplug.calibration.channels import Channels
from qplug.calibration.gram import Gram
from qplug.machine.processes import Processes


@dataclass(frozen=True, eq=False)
class SeenTokens:
    """The tokens of a batch, or of several that follow one another.

    ``starts``: the first token of each window, int64, ascending. ``real`` and ``counted``, bool
    ``[tokens]``, are false for padding, and for padding and all other tokens that sums leave out;
    None if there are none.
    """

    starts: Tensor
    tokens: int
    real: Tensor | None
    counted: Tensor | None

    @classmethod
    def of(
        cls,
        length: int,
        windows: int,
        real: Tensor | None,
        counted: Tensor | None,
        device: torch.device,
    ) -> SeenTokens:
        """A batch of ``windows`` of ``length`` tokens; ``real``, ``counted`` by window and token.

        ``counted`` is ``real`` by default.
        """
        flat = None if real is None else real.flatten().to(device)
        is_own = counted is not None and counted is not real
        own = counted.flatten().to(device) if counted is not None and is_own else flat
        starts = torch.arange(0, windows * length, max(1, length), device=device)
        return cls(starts, windows * length, flat, own)

    @classmethod
    def joined(cls, batches: Sequence[SeenTokens]) -> SeenTokens:
        """All ``batches``, one after the other."""
        before, starts = 0, []
        for batch in batches:
            starts.append(batch.starts + before)
            before += batch.tokens

        def masks(of: Callable[[SeenTokens], Tensor | None]) -> Tensor | None:
            found = [of(batch) for batch in batches]
            if all(mask is None for mask in found):
                return None
            device = batches[0].starts.device
            return torch.cat(
                [
                    torch.ones(batch.tokens, dtype=torch.bool, device=device)
                    if mask is None
                    else mask
                    for batch, mask in zip(batches, found, strict=True)
                ]
            )

        real = masks(lambda batch: batch.real)
        is_own = any(batch.counted is not batch.real for batch in batches)
        counted = masks(lambda batch: batch.counted) if is_own else real
        return cls(torch.cat(starts), before, real, counted)

    def windows(self, tokens: Tensor) -> Tensor:
        """The window of each of ``tokens``, int64."""
        return torch.searchsorted(self.starts, tokens, right=True) - 1


class Statistics:
    """Running sums over the rows of ``x: [tokens, in]``; ``sample`` keeps a few rows themselves.

    ``drift``, float32 ``[in, in]``, is the sum of ``xᵀ(y - x)`` and ``total_shift``, ``[in]``, the
    sum of ``y - x``, where ``y`` is the same input in the float model; None unless ``with_drift``.
    ``by_window`` also keeps the extremes of each window of tokens.
    """

    def __init__(
        self,
        width: int,
        device: torch.device,
        sample: int,
        *,
        by_window: bool = False,
        with_drift: bool = False,
        room: Tensor | None = None,
        channels: Channels | None = None,
    ) -> None:
        """``sample``: rows to keep at most. ``room``: as in ``Gram``.

        ``channels``, of one tensor and no rows, are what sums are added to, if not its own.
        """
        self.tokens = 0
        self._gram = Gram(width, device, room)
        self._channels = channels or Channels.of_no_rows(1, width, device)
        self.drift = torch.zeros(width, width, device=device) if with_drift else None
        self.total_shift = torch.zeros(width, device=device) if with_drift else None
        self.total, self.absolute = self._channels.total[0], self._channels.absolute[0]
        self.low, self.high = self._channels.low[0], self._channels.high[0]
        self._room = sample
        self._kept: list[Tensor] = []
        self._by_window = by_window
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []

    def observe_windows(
        self,
        x: Tensor,
        sampled: int,
        length: int,
        real: Tensor | None = None,
        float_x: Tensor | None = None,
        *,
        counted: Tensor | None = None,
    ) -> None:
        """``observe`` for ``x: [..., in]`` that holds windows of ``length`` tokens, in order.

        Extremes are kept for each window. ``real``, bool ``[windows, tokens]``, is false for
        padding. ``counted`` is also false for tokens that count for extremes alone, since engines
        round these too; by default it is ``real``.
        """
        seen = SeenTokens.of(
            length, -(-x.shape[:-1].numel() // max(1, length)), real, counted, x.device
        )
        tokens = torch.arange(x.shape[:-1].numel(), device=x.device)
        if real is not None:
            found = _tokens_of(x, real.shape)
            if found is None:  # nothing says which rows are padding
                seen = replace(seen, real=None, counted=None)
            else:
                tokens = found
        float_x = None if float_x is None else float_x.flatten(0, -2)
        self.observe_tokens(x.flatten(0, -2), tokens, seen, sampled, float_x)

    def observe_tokens(
        self,
        x: Tensor,
        tokens: Tensor,
        seen: SeenTokens,
        sampled: int,
        float_x: Tensor | None = None,
        float_tokens: Tensor | None = None,
    ) -> None:
        """``observe`` for ``x: [rows, in]``, whose rows belong to ``tokens``, int64 ``[rows]``.

        ``tokens`` are places in the batch ``seen``, ascending. ``float_x`` are the rows of the
        float model, which belong to ``float_tokens``, by default to the same; only tokens in both
        count for ``drift``.
        """
        same = float_tokens is None
        if seen.real is not None:
            kept = seen.real[tokens]
            x, tokens = x[kept], tokens[kept]
            float_x = float_x[kept] if float_x is not None and same else float_x
        if self._by_window and len(x):
            _, counts = torch.unique_consecutive(seen.windows(tokens), return_counts=True)
            windows = x.float().split(counts.tolist())
            self._lows.append(torch.stack([window.amin(0) for window in windows]))
            self._highs.append(torch.stack([window.amax(0) for window in windows]))
        if seen.counted is not None and seen.counted is not seen.real:
            self._channels.widen(x)
            kept = seen.counted[tokens]
            x, tokens = x[kept], tokens[kept]
            float_x = float_x[kept] if float_x is not None and same else float_x
        if float_x is not None and float_tokens is not None:
            in_both = torch.isin(tokens, float_tokens), torch.isin(float_tokens, tokens)
            self.compare(x[in_both[0]], float_x[in_both[1]])
            float_x = None
        self.observe(x, sampled, float_x)

    def observe(self, x: Tensor, sampled: int, float_x: Tensor | None = None) -> None:
        """Adds the rows of ``x: [tokens, in]``; at most ``sampled`` of them go into the sample.

        ``float_x: [tokens, in]``: the same rows in the float model.
        """
        if not len(x):
            return
        self.tokens += x.shape[0]
        self._gram.add(x)
        if float_x is not None:
            self.compare(x, float_x)
        self._channels.add(x)
        count = min(sampled, self._room, x.shape[0])
        if count:
            even = torch.arange(count, device=x.device) * x.shape[0] // count
            self._kept.append(x[even].float())
            self._room -= count

    def settle(self) -> None:
        """Frees what was held back for more rows, of which few or none will come."""
        self._gram.value  # noqa: B018  # brings the sum up to date

    @property
    def is_plain(self) -> bool:
        """Whether rows are all that it wants: neither windows nor the float model's inputs."""
        return self.drift is None and not self._by_window

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
        """The greatest ``x`` of each channel in each window, float32 ``[windows, in]``, if kept."""
        return torch.cat(self._highs) if self._highs else None

    @property
    def sample(self) -> Tensor:
        """Some of the rows, float32 ``[rows, in]``."""
        return torch.cat(self._kept) if self._kept else self.gram[:0]

    def compare(self, x: Tensor, float_x: Tensor) -> None:
        """Adds to ``drift`` and ``total_shift``; ``x`` and ``float_x``: ``[tokens, in]``."""
        assert self.drift is not None
        assert self.total_shift is not None
        shift = float_x.float() - x.float()
        self.total_shift += shift.sum(0)
        if not x.is_cuda or x.dtype == torch.float32:
            self.drift.addmm_(x.T.float(), shift)
        else:  # the difference of two close numbers has few significant digits anyway
            self.drift += torch.mm(x.T, shift.to(x.dtype), out_dtype=torch.float32)


def observe_side_by_side(
    statistics: Sequence[Statistics], x: Tensor, counts: Sequence[int], sampled: Sequence[int]
) -> None:
    """``observe`` for several on a GPU: the first ``counts[0]`` rows of ``x`` are the first's.

    ``x: [rows, in]``. ``sampled`` is by statistics, whose channels follow one another in memory.
    """
    starts = [0, *accumulate(counts)]
    on_device = torch.tensor(starts, device=x.device)
    Channels.joined([own._channels for own in statistics]).add(x, on_device)
    rows: list[int] = []
    kept = []
    for own, start, count, most in zip(statistics, starts, counts, sampled, strict=False):
        if count:
            own.tokens += count
            own._gram.add(x[start : start + count])
        kept.append(min(most, own._room, count))
        rows += (start + place * count // kept[-1] for place in range(kept[-1]))
    sample = x[torch.tensor(rows, dtype=torch.int64, device=x.device)].float().split(kept)
    for own, count, part in zip(statistics, kept, sample, strict=True):
        if count:
            own._kept.append(part)
            own._room -= count


def _tokens_of(x: Tensor, shape: torch.Size) -> Tensor | None:
    """The place in the batch of the token of each row of ``x: [..., in]``, int64 ``[rows]``.

    ``shape``: windows and tokens of a batch. These are neighbouring axes of ``x``, or one axis;
    others, such as heads or parallel streams, give a token several rows. None if no axes fit, as
    where a block joins neighbouring tokens.
    """
    axes, count = [*x.shape[:-1]], shape.numel()
    for wanted in ([*shape], [count]):
        for start in range(len(axes)):
            end = start + len(wanted)
            if axes[start:end] == wanted:
                around = [1] * start + wanted + [1] * (len(axes) - end)
                numbers = torch.arange(count, device=x.device).view(around)
                return numbers.expand(axes).flatten()
    return None


def share(statistics: Sequence[Statistics], processes: Processes) -> None:
    """Merges the statistics of all processes, in place; afterwards each process has the same."""
    by_rank = processes.gather([(s.tokens, s._kept, s._lows, s._highs) for s in statistics])
    for number, merged in enumerate(statistics):
        merged.tokens = sum(seen[number][0] for seen in by_rank)
        merged._kept = [rows for seen in by_rank for rows in seen[number][1]]
        merged._lows = [rows for seen in by_rank for rows in seen[number][2]]
        merged._highs = [rows for seen in by_rank for rows in seen[number][3]]
    sums = [total for s in statistics for total in (s.gram, s.total, s.absolute)]
    sums += [drift for s in statistics for drift in (s.drift, s.total_shift) if drift is not None]
    processes.reduce(
        sums=sums,
        least=[s.low for s in statistics],
        most=[s.high for s in statistics],
    )
