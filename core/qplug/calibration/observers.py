"""Observers: up to which magnitude the static scale of an input covers it.

An observer sees an input group, so all linears that read one tensor get one scale. Engines that
fuse these linears would take the largest scale anyway.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from qplug.api import Component, InputGroup, NoParams
from qplug.api.component import P
from qplug.api.params import Param, fill
from qplug.api.scheme import QuantArgs
from qplug.errors import QplugError
from qplug.numerics.activations import fake_quantize_activations, input_scale


class Observer(Component[P]):
    """Chooses the magnitude above which the inputs of a group are clipped."""

    @abstractmethod
    def peak(self, group: InputGroup, args: QuantArgs) -> Tensor:
        """The largest ``|x|`` that is not clipped, float32 ``[]``.

        Called after all algorithms that move scale. ``args``: how inputs are rounded.
        """


class MinMax(Observer[NoParams]):
    """The largest magnitude of all tokens: nothing is clipped."""

    name = "minmax"

    def peak(self, group: InputGroup, args: QuantArgs) -> Tensor:
        return torch.maximum(group.high.amax(), -group.low.amin())


@dataclass(frozen=True)
class MovingAverageParams:
    momentum: Annotated[
        float, Param("The share of a new window in the average.", 0, 1, ("averaging_constant",))
    ] = 0.01


class MovingAverage(Observer[MovingAverageParams]):
    """A moving average of the extremes of calibration windows: rare outliers are clipped."""

    name = "moving-average"
    Params = MovingAverageParams

    def peak(self, group: InputGroup, args: QuantArgs) -> Tensor:
        assert group.lows is not None
        assert group.highs is not None
        lows, highs = group.lows.amin(1), group.highs.amax(1)  # [windows]
        low, high = lows[0].clone(), highs[0].clone()
        for window in range(1, len(lows)):
            low += self.params.momentum * (lows[window] - low)
            high += self.params.momentum * (highs[window] - high)
        return torch.maximum(high, -low).clamp(min=0)


@dataclass(frozen=True)
class HistogramParams:
    bins: Annotated[int, Param("Bins in which a magnitude doubles.", 8, 65536)] = 512
    octaves: Annotated[int, Param("Halvings until a magnitude is taken for 0.", 1)] = 16
    steps: Annotated[int, Param("Thresholds that are tried in each halving.", 1)] = 64


class Histogram(Observer[HistogramParams]):
    """The threshold of least squared rounding error, on a histogram of some of the tokens.

    Bins have equal ratios, not equal widths, so they are finer than the steps of the grid for every
    threshold. No threshold is below a 256th of the largest magnitude.
    """

    name = "histogram"
    Params = HistogramParams
    _HALVINGS: ClassVar[int] = 8

    def peak(self, group: InputGroup, args: QuantArgs) -> Tensor:
        top = torch.maximum(group.high.amax(), -group.low.amin())
        if not top > 0:
            return top
        counts, values = self._histogram(group.sample, top)
        best, least = top, torch.inf
        for step in range(self._HALVINGS * self.params.steps + 1):
            threshold = top * 2.0 ** (-step / self.params.steps)
            rounded = fake_quantize_activations(values, args, input_scale(threshold, args))
            error = (counts * (rounded - values).double().square()).sum().item()
            if error < least:
                best, least = threshold, error
        return best

    def _histogram(self, sample: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Counts, float64, and middles, float32, of the bins of ``|x|`` up to ``top``.

        Zeros are in no bin.
        """
        bins, octaves = self.params.bins, self.params.octaves
        counts = torch.zeros(bins * octaves, dtype=torch.int64, device=sample.device)
        for rows in sample.split(64):
            halvings = torch.log2(rows.abs().flatten() / top) + octaves  # at most `octaves`
            places = (halvings[halvings > 0] * bins).long().clamp_(max=len(counts) - 1)
            counts += torch.bincount(places, minlength=len(counts))
        middles = (torch.arange(len(counts), device=sample.device) + 0.5) / bins - octaves
        return counts.double(), top * torch.exp2(middles)


OBSERVERS: dict[str, type[Observer[Any]]] = {
    kind.name: kind for kind in (MinMax, MovingAverage, Histogram)
}


def find_observer(name: str, options: Mapping[str, Any]) -> Observer[Any]:
    """The observer ``name``. Raises QplugError if there is none, or if an option is wrong."""
    if name not in OBSERVERS:
        raise QplugError(f"--observer {name}: unknown; choose one of {', '.join(OBSERVERS)}")
    kind = OBSERVERS[name]
    params: object = fill(kind.Params, options, f"observer {name}")
    return kind(params)
