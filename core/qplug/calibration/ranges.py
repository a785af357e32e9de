"""Numbers that only a calibrated run can tell of a layer: what its inputs span, what is clipped.

They are the same whenever the run is, so they are kept in ``qplug.json`` for reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch

from qplug.api import Block, Linear, QuantizedWeight
from qplug.numerics.scales import minmax_scale

#: The least ratio of each count of ``clip_counts``: 0 to 0.55, 0.55 to 0.6 ... and not clipped at
#: all, but for the rounding of scales to bfloat16.
CLIP_BINS = (0.0, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.995)


@dataclass(frozen=True)
class InputRange:
    """The least and the greatest input of a linear over all tokens.

    ``typical`` is the median over channels of the largest ``|x|``: where it is far below that of
    the whole range, a few channels are outliers.
    """

    low: float
    high: float
    typical: float

    def to_list(self) -> list[float]:
        """A plain form for JSON."""
        return [*astuple(self)]

    @classmethod
    def from_list(cls, plain: Sequence[float]) -> InputRange:
        """The inverse of ``to_list``."""
        return cls(*plain)


def input_ranges(block: Block) -> dict[str, InputRange]:
    """The ranges of what the linears of ``block`` read, as they are now, by linear.

    Linears that no token reached, as those of some experts, are left out.
    """
    found = {}
    for group in block.groups:
        if not group.tokens:
            continue
        channels = torch.maximum(-group.low, group.high)
        range_ = InputRange(
            short(group.low.min().item()),
            short(group.high.max().item()),
            short(channels.median().item()),
        )
        found.update({linear.name: range_ for linear in group.linears})
    return found


def clip_counts(linear: Linear, made: QuantizedWeight) -> tuple[int, ...]:
    """How many scales of ``made`` are how much smaller than those that cover the weight.

    ``CLIP_BINS`` tells which ratio each count is of. Empty if nothing is clipped.
    """
    covering, _ = minmax_scale(linear.weight, linear.args, made.global_scale)
    ratios = made.scale / covering
    edges = torch.tensor(CLIP_BINS[1:], device=ratios.device)
    bins = torch.bucketize(ratios.flatten(), edges, right=True)
    counts: list[int] = torch.bincount(bins, minlength=len(CLIP_BINS)).tolist()
    return tuple(counts) if any(counts[:-1]) else ()


def short(number: float) -> float:
    """To four digits: as much as a reader wants, and the same after a way through JSON."""
    return float(f"{number:.4g}")
