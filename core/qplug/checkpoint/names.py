"""Names of tensors and modules: taken apart, made relative to a block, compared and sorted.

A tensor ``model.layers.0.mlp.up_proj.weight`` has the module ``model.layers.0.mlp.up_proj`` and the
local name ``weight``; within the block ``model.layers.0`` its name is ``mlp.up_proj.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def split_name(name: str) -> tuple[str, str]:
    """The module and the local name of a tensor; the module is ``""`` if the name has no dot."""
    module, _, local = name.rpartition(".")
    return module, local


def module_of(name: str) -> str:
    """The name without its last part: the module of a tensor, or the parent of a module."""
    return split_name(name)[0]


def local_of(name: str) -> str:
    """The last part of a name."""
    return split_name(name)[1]


def by_module(tensors: Iterable[str]) -> dict[str, list[str]]:
    """The local names of ``tensors``, grouped by module."""
    local_names: dict[str, list[str]] = {}
    for tensor in tensors:
        module, local = split_name(tensor)
        local_names.setdefault(module, []).append(local)
    return local_names


def is_within(block: str, name: str) -> bool:
    """Whether ``name`` is the name of something inside the module ``block``."""
    return name.startswith(f"{block}.")


def block_of(name: str, blocks: Sequence[str]) -> int | None:
    """The index of the block of ``blocks`` that ``name`` is inside, or None.

    No block is inside of another.
    """
    end = name.find(".")
    while end >= 0:
        if name[:end] in blocks:
            return blocks.index(name[:end])
        end = name.find(".", end + 1)
    return None


def relative_name(block: str, name: str) -> str:
    """``name`` as it is called within ``block``; unchanged if it is not inside."""
    return name.removeprefix(f"{block}.")


def within(block: str, items: Mapping[str, T]) -> dict[str, T]:
    """The ``items`` whose names are inside ``block``, by their names relative to it."""
    return {relative_name(block, n): item for n, item in items.items() if is_within(block, n)}


def kind_of(name: str) -> str:
    """``name`` with a star for each number between dots: experts of a layer are of one kind."""
    return _NUMBER.sub("*", name)


def natural_order(names: Iterable[str]) -> list[str]:
    """``names`` sorted so that layer 2 comes before layer 10."""
    return sorted(
        names,
        key=lambda name: [
            (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")
        ],
    )
