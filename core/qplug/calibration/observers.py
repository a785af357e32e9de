"""Which magnitudes of its inputs a static scale covers: observers, and the scales they lead to.

Ranges are those of an input group, so the linears that read one tensor get one scale: engines that
fuse them take the largest anyway.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from qplug.api import Block, Component, InputGroup, NoParams
from qplug.api.component import P
from qplug.api.params import Param, fill
from qplug.api.scheme import QuantArgs
from qplug.errors import QplugError
from qplug.numerics.rounding import (
    fake_quantize_activations,
    global_scale_of,
    input_scale,
    scale_of,
)
from qplug.numerics.scale_formats import as_stored


class Observer(Component[P]):
    """Decides up to where the inputs of a group are not clipped."""

    @abstractmethod
    def peak(self, group: InputGroup, args: QuantArgs) -> Tensor:
        """The largest ``|x|`` that is to keep a code of its own, float32 ``[]``.

        Asked once everything that moves scale has run; ``args`` is how inputs are rounded.
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
    """The extremes of each calibration window, averaged as they come: rare outliers are clipped."""

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

    Bins are of equal ratio, not of equal width: they stay finer than the steps of a grid whatever
    the threshold. No threshold is below a 256th of the largest magnitude.
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
        """Counts, float64, and middles, float32, of the bins of ``|x| / top``; zeros have none."""
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
    """Raises QplugError if there is none of that name, or an option is wrong."""
    if name not in OBSERVERS:
        raise QplugError(f"--observer {name}: there are {', '.join(OBSERVERS)}")
    kind = OBSERVERS[name]
    params: object = fill(kind.Params, options, f"observer {name}")
    return kind(params)


def fix_input_scales(block: Block, observer: Observer[Any]) -> None:
    """Choose ``input_scale`` of the linears of ``block`` that have static inputs and none yet.

    The experts of a layer get one scale, which engines have room for, and which holds for experts
    that saw no token. Raises QplugError, without the block's name, where none has shown a range.
    """
    for _, alike in groupby(block.groups, lambda group: group.experts or id(group)):
        groups = [*alike]
        linears = [linear for group in groups for linear in group.linears]
        for args in dict.fromkeys(linear.activations for linear in linears):
            if args is None or not args.stores_scale:
                continue
            peaks = [observer.peak(g, args) for g in groups if g.tokens and _reads_with(g, args)]
            if not peaks or not torch.isfinite(torch.stack(peaks)).all():
                names = ", ".join(linear.name for linear in linears)
                raise QplugError(f"{names}: no range of inputs was seen in the calibration data")
            scale = input_scale(torch.stack(peaks).amax(), args).reshape(1)
            for linear in linears:
                if linear.activations == args and linear.input_scale is None:
                    linear.input_scale = scale
    for linear in block.linears:
        if linear.activations and linear.activations.stores_scale and linear.input_scale is None:
            raise QplugError(f"{linear.name}: no token of the calibration data reached it")


def _reads_with(group: InputGroup, args: QuantArgs) -> bool:
    return any(linear.activations == args for linear in group.linears)


def share_tensor_scales(block: Block) -> None:
    """Give the linears of a group whose weights have one scale each the same: the largest.

    Of experts, those of one. Engines fuse such linears, keep the largest scale, and round the codes
    of the others once more: with one scale from the start there is nothing left to round.
    """
    for group in (part for whole in block.groups for part in whole.parts):
        for args in dict.fromkeys(linear.args for linear in group.linears):
            if args.strategy != "tensor" or not args.symmetric:
                continue
            alike = [linear for linear in group.linears if linear.args == args]
            shared = torch.stack([scale_of(linear)[0] for linear in alike]).amax(0)
            for linear in alike:
                linear.scale, linear.zero = shared, None


def share_global_scales(block: Block, merged: Sequence[Sequence[str]]) -> None:
    """Fix the global scales of the linears of ``block`` whose scales have two levels.

    Those of a group in ``merged`` get the largest: engines keep that one, and round nothing anew.
    Scales that were chosen already are rounded to multiples of it.
    """
    linears = {linear.name: linear for linear in block.linears if linear.args.two_level}
    for linear in linears.values():
        linear.global_scale = global_scale_of(linear)
    for names in merged:
        alike = [linears[name] for name in names if name in linears]
        units = [linear.global_scale for linear in alike if linear.global_scale is not None]
        for linear in alike:
            linear.global_scale = torch.stack(units).amax(0)
    for linear in linears.values():
        if linear.scale is not None:
            linear.scale = as_stored(linear.scale, linear.args, linear.global_scale)
