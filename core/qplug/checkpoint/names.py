"""Names of tensors and modules, taken apart and sorted."""

from __future__ import annotations

from collections.abc import Iterable


def by_module(tensors: Iterable[str]) -> dict[str, list[str]]:
    """The local names of ``tensors`` by the module that they are of."""
    found: dict[str, list[str]] = {}
    for tensor in tensors:
        name, _, local = tensor.rpartition(".")
        found.setdefault(name, []).append(local)
    return found


def natural_order(names: Iterable[str]) -> list[str]:
    """``names`` sorted so that layer 2 comes before layer 10."""
    return sorted(
        names,
        key=lambda name: [
            (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")
        ],
    )
