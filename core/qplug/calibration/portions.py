"""Experts in portions, where a block does not fit into memory at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qplug.model.experts import expert_of, experts_in
from qplug.model.input_groups import GroupPaths

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Bytes for each weight of a part: as it is stored, in float32, its code, and a copy in float32.
PER_WEIGHT = 2 + 4 + 1 + 4
#: Bytes for each entry of a Gram matrix.
PER_ENTRY = 4
#: Bytes that steps on a part take besides: copies of the layers that are worked on side by side,
#: and of a batch.
BESIDES = 3 << 30


@dataclass(frozen=True)
class Room:
    """The bytes that a block takes on the device.

    ``rest``: the block without its experts. ``expert``: the largest expert, with its Gram matrices;
    ``experts``: all of them. ``layers``: the number of layers of experts; ``most``: the number of
    experts of the largest one. ``kept``: the tokens at the experts; ``rounded``: the weights of all
    experts with which the tokens go on.
    """

    rest: float
    expert: float = 0
    experts: float = 0
    layers: int = 0
    most: int = 0
    kept: float = 0
    rounded: float = 0

    @property
    def whole(self) -> float:
        """The bytes of all parts at once."""
        return self.rest + self.kept + self.experts

    def portion(self, budget: float) -> int | None:
        """The number of experts of each layer in a portion; None if ``budget`` bytes are enough.

        It is a power of two: portions stay the same if a little more or less memory is free.
        """
        if not self.layers or self.whole + BESIDES <= budget:
            return None
        count, per_number = 1, self.expert * self.layers
        while 2 * count * per_number <= budget - BESIDES - self._staying(budget):
            count *= 2
        return count

    def peak(self, budget: float) -> float:
        """The bytes of the largest part, and of what stays, within ``budget`` bytes."""
        count = self.portion(budget)
        if count is None:
            return self.whole
        return self._staying(budget) + min(count, self.most) * self.expert * self.layers

    def _staying(self, budget: float) -> float:
        rounded = self.rounded if self.rounded <= budget / 2 else 0
        return self.rest + self.kept + rounded


def divide_experts(
    block: nn.Module, weights: Mapping[str, Tensor], tokens: int, budget: int | None
) -> list[range] | None:
    """The experts of each portion of ``block``; None if the whole block takes ``budget`` bytes.

    ``weights``: all weights of the block; ``tokens``: the number of calibration tokens, whose
    tensors at the experts stay in memory. None also if nothing limits memory, or without experts.
    """
    if budget is None or not experts_in(block):
        return None
    room = room_of(block, weights, tokens)
    count = room.portion(budget)
    if count is None:
        return None
    return [range(start, min(start + count, room.most)) for start in range(0, room.most, count)]


def room_of(block: nn.Module, weights: Mapping[str, Tensor], tokens: int) -> Room:
    """What ``block``, which has experts, takes with these ``weights`` and so many ``tokens``."""
    layers = experts_in(block)
    sizes = {"": 0.0}
    kept = rounded = 0
    for name, weight in weights.items():
        path, _, local = name.rpartition(".")
        expert = expert_of(block, path) if local in ("weight", "bias") else None
        key = "" if expert is None else f"{expert[0]}.{expert[1]}"
        size = weight.numel() * PER_WEIGHT
        rounded += 0 if expert is None else weight.numel() * weight.element_size()
        if expert is not None and weight.ndim == 2:
            layer, linear = layers[expert[0]], path.rpartition(".")[2]
            if linear in (layer.readers[0], layer.last):
                size += PER_ENTRY * weight.shape[1] ** 2
            if linear == layer.readers[0] and expert[1] == 0:
                kept += tokens * weight.shape[1] * weight.element_size()
        sizes[key] = sizes.get(key, 0.0) + size
    return Room(
        sizes.pop(""),
        max(sizes.values()),
        sum(sizes.values()),
        len(layers),
        max(len(layer) for layer in layers.values()),
        kept,
        rounded,
    )


def part_of_weights(
    block: nn.Module, weights: Mapping[str, Tensor], numbers: Collection[int]
) -> dict[str, Tensor]:
    """The ``weights`` of the experts with these ``numbers``; without any, all others' weights."""
    return {name: w for name, w in weights.items() if _is_in(block, name, numbers)}


def _is_in(block: nn.Module, name: str, numbers: Collection[int]) -> bool:
    path, _, local = name.rpartition(".")
    expert = expert_of(block, path) if local in ("weight", "bias") else None
    return not numbers if expert is None else expert[1] in numbers


def part_of_structure(
    structure: Collection[GroupPaths], block: nn.Module, numbers: Collection[int]
) -> tuple[GroupPaths, ...]:
    """The groups of the experts with these ``numbers``; without any, all others' groups.

    Groups that experts and others share have no producer: no scale can be moved into experts that
    are not there.
    """
    parts = []
    for group in structure:
        linears = tuple(path for path in group.linears if _is_in(block, f"{path}.weight", numbers))
        by_expert = tuple(
            linears for linears in group.by_expert if _is_in(block, f"{linears[0]}.weight", numbers)
        )
        if linears:
            producer = None if group.by_expert else group.producer
            parts.append(replace(group, linears=linears, by_expert=by_expert, producer=producer))
    return tuple(parts)
