"""Numbers about a layer that only a calibrated run knows: ranges of inputs, counts of clips.

A run gives the same numbers each time, so reports find them in ``qplug.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qplug.api import Block, InputGroup, Linear, QuantizedWeight
from qplug.numerics.alike import as_one, of_one_shape, together
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
        return [self.low, self.high, self.typical]

    @classmethod
    def from_list(cls, plain: Sequence[float]) -> InputRange:
        """The inverse of ``to_list``."""
        return cls(*plain)


def input_ranges(block: Block) -> dict[str, InputRange]:
    """The current input ranges of the linears of ``block``, by linear.

    Linears that no token reached, such as those of some experts, are left out.
    """
    groups = [group for group in block.groups if group.tokens]
    if not groups:
        return {}
    by_width: dict[int, list[InputGroup]] = {}
    for group in groups:
        by_width.setdefault(group.width, []).append(group)
    found = []
    for alike in by_width.values():
        low = together([group.low for group in alike])
        high = together([group.high for group in alike])
        typical = torch.maximum(-low, high).median(1).values
        found.append(torch.stack([low.amin(1), high.amax(1), typical], dim=1))
    in_order = [group for alike in by_width.values() for group in alike]
    known = {  # a GPU is waited for once
        id(group): InputRange(*map(four_digits, numbers))
        for group, numbers in zip(in_order, torch.cat(found).tolist(), strict=True)
    }
    ranges = {}
    for group in groups:
        ranges.update({linear.name: known[id(group)] for linear in group.linears})
    return ranges


def clip_counts(
    linears: Sequence[Linear], codes: Mapping[str, QuantizedWeight]
) -> dict[str, tuple[int, ...]]:
    """Counts of the scales in ``codes`` by their ratio to the scales that cover the weight.

    Both are by linear. ``CLIP_BINS`` has the ratios. Linears that clip nothing are left out.
    """
    if not linears:
        return {}
    edges = torch.tensor(CLIP_BINS[1:], device=linears[0].weight.device)
    names, found = [], []
    for alike in of_one_shape([linear.weight for linear in linears]):
        run = [linears[place] for place in alike]
        names += [linear.name for linear in run]
        joined = as_one([codes[linear.name] for linear in run])
        if joined is None or joined.args.strategy == "tensor" or joined.args.two_level:
            found += [_counts(linear.weight, codes[linear.name], 1, edges) for linear in run]
        else:
            weight = together([linear.weight for linear in run]).flatten(0, 1)
            found.append(_counts(weight, joined, len(run), edges))
    counts: list[list[int]] = torch.cat(found).tolist()
    by_name = {name: tuple(own) for name, own in zip(names, counts, strict=True) if any(own[:-1])}
    return {linear.name: by_name[linear.name] for linear in linears if linear.name in by_name}


def _counts(weight: Tensor, quantized: QuantizedWeight, count: int, edges: Tensor) -> Tensor:
    """The counts of ``count`` weights that lie one below the other, int64 ``[count, bins]``."""
    covering, _ = minmax_scale(weight, quantized.args, quantized.global_scale)
    bins = torch.bucketize((quantized.scale / covering).view(count, -1), edges, right=True)
    width = len(edges) + 1
    bins += width * torch.arange(count, device=bins.device)[:, None]
    return torch.bincount(bins.flatten(), minlength=count * width).view(count, width)


def four_digits(number: float) -> float:
    """``number`` rounded to four significant digits, which JSON keeps exactly."""
    return float(f"{number:.4g}")
