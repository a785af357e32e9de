"""The input groups of a block in parts, where a block without experts does not fit into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qplug.calibration.portions import BESIDES, PER_ENTRY, PER_WEIGHT
from qplug.model.input_groups import GroupPaths

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes for each weight of the block, as it is stored and with which the tokens go on.
_STORED = _ROUNDED = 2
#: Bytes for each weight of a part, besides: in float32, its code, and a copy in float32.
_IN_PART = PER_WEIGHT - 2


@dataclass(frozen=True)
class GroupRoom:
    """The numbers of weights in a block: ``others`` are not in ``groups``.

    ``groups``: for each input group the number of its weights, and the width of its Gram matrix.
    The groups with numbers in ``floats`` stay float: a block is divided as if they had a Gram
    matrix, but none is made.
    """

    others: int
    groups: Sequence[tuple[int, int]]
    floats: frozenset[int] = field(default_factory=frozenset)

    @property
    def whole(self) -> int:
        """The bytes that all groups take at once."""
        return PER_WEIGHT * self._weights + sum(map(self._entries, range(len(self.groups))))

    def parts(self, budget: float) -> list[list[int]] | None:
        """The numbers of the groups in each part, the largest last; None if all have room.

        The first part also has the other weights.
        """
        if len(self.groups) < 2 or self.whole + BESIDES <= budget:
            return None
        room = budget - BESIDES - (_STORED + _ROUNDED) * self._weights
        parts: list[list[int]] = [[]]
        taken = float(_IN_PART * self.others)
        for number in sorted(range(len(self.groups)), key=self._size):
            size = self._size(number)
            if parts[-1] and taken + size > room:
                parts.append([])
                taken = 0
            parts[-1].append(number)
            taken += size
        return parts

    def peak(self, budget: float) -> float:
        """The bytes of the largest part, and of what stays, within ``budget`` bytes."""
        parts = self.parts(budget)
        if parts is None:
            return self.whole - sum(map(self._entries, self.floats))
        found: list[float] = []
        stored, finished = _STORED * self._weights, 0
        for part in parts:
            others = 0 if found else self.others
            if part is parts[-1]:
                stored = 0  # the tokens pass the block before
            own = sum(map(self._size, part)) + _IN_PART * others
            own -= sum(self._entries(number) for number in part if number in self.floats)
            found.append(stored + finished + own)
            finished += _ROUNDED * (others + sum(self.groups[number][0] for number in part))
        return max(found)

    @property
    def _weights(self) -> int:
        return self.others + sum(count for count, _ in self.groups)

    def _size(self, number: int) -> int:
        return _IN_PART * self.groups[number][0] + self._entries(number)

    def _entries(self, number: int) -> int:
        """The bytes of the Gram matrix of a group."""
        return PER_ENTRY * self.groups[number][1] ** 2


def divide_groups(
    structure: Sequence[GroupPaths], weights: Mapping[str, Tensor], budget: float
) -> list[tuple[GroupPaths, ...]] | None:
    """The groups of each part of a block; None if the whole block takes ``budget`` bytes.

    ``weights``: of the block, by relative name.
    """
    groups = []
    for group in structure:
        own = [weights[name] for name in weights_of(group) if name in weights]
        groups.append((sum(w.numel() for w in own), own[0].shape[-1] if own else 0))
    others = sum(w.numel() for w in weights.values()) - sum(count for count, _ in groups)
    parts = GroupRoom(others, groups).parts(budget)
    if parts is None:
        return None
    return [tuple(structure[number] for number in sorted(part)) for part in parts]


def weights_of(group: GroupPaths) -> list[str]:
    """The names of the weights of the linears of ``group``."""
    return [f"{path}.weight" for path in group.linears]


def weights_of_part(
    parts: Sequence[Sequence[GroupPaths]], number: int, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The ``weights`` of the part with ``number``; others are the first's."""
    own = {name for group in parts[number] for name in weights_of(group)}
    elsewhere = {name for part in parts for group in part for name in weights_of(group)} - own
    return {
        name: weight
        for name, weight in weights.items()
        if name in own or (number == 0 and name not in elsewhere)
    }
