"""Numbers about a layer that only a calibrated run knows: ranges of inputs, counts of clips.

A run gives the same numbers each time, so reports find them in ``qplug.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch

from qplug.api import Block, Linear, QuantizedWeight
from qplug.numerics.scales import minmax_scale

#: The least ratio of each count of ``clip_counts``: 0 to 0.55, 0.55 to 0.6 and so on. The last
#: means not clipped; it is below 1 because scales are rounded to bfloat16.
CLIP_BINS = (0.0, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.995)


@dataclass(frozen=True)
class InputRange:
    """The least and the greatest input of a linear over all tokens.

    ``typical``: the median over channels of the largest ``|x|``. If it is far below the whole
    range, a few channels are outliers.
    """

    low: float
    high: float
    typical: float

    def to_list(self) -> list[float]:
        """The range as plain numbers, for JSON."""
        return [*astuple(self)]

    @classmethod
    def from_list(cls, plain: Sequence[float]) -> InputRange:
        """The inverse of ``to_list``."""
        return cls(*plain)


def input_ranges(block: Block) -> dict[str, InputRange]:
    """The current input ranges of the linears of ``block``, by linear.

    Linears that no token reached, such as those of some experts, are left out.
    """
    ranges = {}
    for group in block.groups:
        if not group.tokens:
            continue
        channels = torch.maximum(-group.low, group.high)
        group_range = InputRange(
            four_digits(group.low.min().item()),
            four_digits(group.high.max().item()),
            four_digits(channels.median().item()),
        )
        ranges.update({linear.name: group_range for linear in group.linears})
    return ranges


def clip_counts(linear: Linear, quantized: QuantizedWeight) -> tuple[int, ...]:
    """Counts of the scales of ``quantized`` by their ratio to the scales that cover the weight.

    ``CLIP_BINS`` has the ratios. Empty if nothing is clipped.
    """
    covering, _ = minmax_scale(linear.weight, linear.args, quantized.global_scale)
    ratios = quantized.scale / covering
    edges = torch.tensor(CLIP_BINS[1:], device=ratios.device)
    bins = torch.bucketize(ratios.flatten(), edges, right=True)
    counts: list[int] = torch.bincount(bins, minlength=len(CLIP_BINS)).tolist()
    return tuple(counts) if any(counts[:-1]) else ()


def four_digits(number: float) -> float:
    """``number`` rounded to four significant digits, which JSON keeps exactly."""
    return float(f"{number:.4g}")
