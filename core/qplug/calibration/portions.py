"""Experts in portions, where a block does not fit into memory at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qplug.model.experts import expert_of, experts_in
from qplug.model.input_groups import GroupPaths

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Bytes for each weight of a part: as it is stored, in float32, its code, and a copy in float32.
_PER_WEIGHT = 2 + 4 + 1 + 4
#: Bytes that steps on a part take besides: copies of a few layers, and of a batch.
_BESIDES = 2 << 30


def divide_experts(
    block: nn.Module, weights: Mapping[str, Tensor], tokens: int, budget: int | None
) -> list[range] | None:
    """The experts of each portion of ``block``; None if the whole block takes ``budget`` bytes.

    ``weights``: all weights of the block; ``tokens``: the number of calibration tokens, whose
    tensors at the experts stay in memory. None also if nothing limits memory, or without experts.
    """
    layers = experts_in(block)
    if budget is None or not layers:
        return None
    sizes = {"": 0.0}
    kept = rounded = 0  # bytes that stay: tokens at experts, and weights with which tokens go on
    for name, weight in weights.items():
        path, _, local = name.rpartition(".")
        expert = expert_of(block, path) if local in ("weight", "bias") else None
        key = "" if expert is None else f"{expert[0]}.{expert[1]}"
        size = weight.numel() * _PER_WEIGHT
        rounded += 0 if expert is None else weight.numel() * weight.element_size()
        if expert is not None and weight.ndim == 2:
            layer, linear = layers[expert[0]], path.rpartition(".")[2]
            if linear in (layer.readers[0], layer.last):
                size += 4 * weight.shape[1] ** 2  # a Gram matrix
            if linear == layer.readers[0] and expert[1] == 0:
                kept += tokens * weight.shape[1] * weight.element_size()
        sizes[key] = sizes.get(key, 0.0) + size
    rest = sizes.pop("") + kept + _BESIDES
    if rest + sum(sizes.values()) <= budget:
        return None
    rest += rounded if rounded <= budget / 2 else 0
    # As many experts of each layer as there is room for, in a power of two: the portions stay the
    # same if a little more or less memory is free.
    per_number = max(sizes.values()) * len(layers)
    count = 1
    while 2 * count * per_number <= budget - rest:
        count *= 2
    most = max(len(layer) for layer in layers.values())
    return [range(start, min(start + count, most)) for start in range(0, most, count)]


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
