"""Finds the linears that engines merge into one matrix when they load a model.

Engines merge linears by name. The tables of this module are the only ones that know these names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from qplug import Problem, Scheme

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_MERGED_NAMES = ("qkv_proj", "gate_up_proj", None, "fused_qkv_a_proj_with_mqa")


def merged_matrices(names: Iterable[str]) -> list[list[str]]:
    """The groups of ``names`` that engines merge into one matrix, each with two or more names."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, local = name.rpartition(".")
        for number, members in enumerate(_FUSED):
            if local in members:
                groups.setdefault((parent, number), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The groups of ``names`` that must share one scheme, each with two or more names.

    All experts of a layer are one group too, because engines stack them.
    """
    experts: dict[str, list[str]] = {}
    dense = []
    for name in names:
        layer, expert, _ = name.partition(".experts.")
        if expert:
            experts.setdefault(layer, []).append(name)
        else:
            dense.append(name)
    stacked = [group for group in experts.values() if len(group) > 1]
    return merged_matrices(dense) + stacked


def divided_groups(names: Iterable[str], schemes: Mapping[str, Scheme]) -> Iterator[list[str]]:
    """Yield the groups of ``names`` that engines fuse although their schemes differ.

    A name without a scheme is float, which differs from every scheme.
    """
    for group in fused_groups(names):
        if len({schemes.get(name) for name in group}) > 1:
            yield group


def fused_problems(names: Iterable[str], schemes: Mapping[str, Scheme]) -> Iterator[Problem]:
    """Yield a problem for each group of ``names`` that engines fuse although schemes differ."""
    for group in divided_groups(names, schemes):
        different = {schemes.get(name) for name in group}
        kinds = " and ".join(sorted(scheme.name if scheme else "float" for scheme in different))
        yield Problem("fused", ", ".join(group[:3]), f"engines merge them, but they are {kinds}")


def with_merged_names(names: Iterable[str]) -> list[str]:
    """``names``, followed by the names that engines give to the matrices merged from them."""
    extended = dict.fromkeys(names)
    for name in list(extended):
        parent, _, local = name.rpartition(".")
        for members, merged in zip(_FUSED, _MERGED_NAMES, strict=True):
            if local in members and merged is not None and ".experts." not in name:
                extended[f"{parent}.{merged}"] = None
    return list(extended)
