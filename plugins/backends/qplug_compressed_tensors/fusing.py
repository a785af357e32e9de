"""Which linears engines merge into one matrix when they load a model.

Engines do this by name; so does this table, the only place that knows them.
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
    """The groups of ``names`` that become one matrix, each with two names or more."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, local = name.rpartition(".")
        for number, members in enumerate(_FUSED):
            if local in members:
                groups.setdefault((parent, number), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The groups of ``names`` that must share one scheme, each with two names or more.

    All experts of a layer are one group too: engines stack them.
    """
    experts: dict[str, list[str]] = {}
    others = []
    for name in names:
        layer, expert, _ = name.partition(".experts.")
        if expert:
            experts.setdefault(layer, []).append(name)
        else:
            others.append(name)
    stacked = [group for group in experts.values() if len(group) > 1]
    return merged_matrices(others) + stacked


def divided_groups(names: Iterable[str], schemes: Mapping[str, Scheme]) -> Iterator[list[str]]:
    """The groups of ``names`` that engines fuse, but that have not one scheme, or no scheme."""
    for group in fused_groups(names):
        if len({schemes.get(name) for name in group}) > 1:
            yield group


def fused_problems(names: Iterable[str], schemes: Mapping[str, Scheme]) -> Iterator[Problem]:
    """A problem for each of the groups that have not one scheme."""
    for group in divided_groups(names, schemes):
        found = {schemes.get(name) for name in group}
        kinds = " and ".join(sorted(scheme.name if scheme else "float" for scheme in found))
        yield Problem("fused", ", ".join(group[:3]), f"are merged, but are {kinds}")


def with_merged_names(names: Iterable[str]) -> list[str]:
    """``names``, and the names that merged linears have in the engine's own module tree."""
    found = dict.fromkeys(names)
    for name in list(found):
        parent, _, local = name.rpartition(".")
        for members, merged in zip(_FUSED, _MERGED_NAMES, strict=True):
            if local in members and merged is not None and ".experts." not in name:
                found[f"{parent}.{merged}"] = None
    return list(found)
