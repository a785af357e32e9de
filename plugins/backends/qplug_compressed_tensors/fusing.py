"""Which linears engines merge into one matrix when they load a model.

Engines do this by name; so does this table, the only place that knows them.
"""

from __future__ import annotations

from collections.abc import Iterable

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The groups of ``names`` that must share one scheme, each with two names or more.

    All experts of a layer are one group too: engines stack them.
    """
    groups: dict[tuple[str, object], list[str]] = {}
    for name in names:
        parent, _, local = name.rpartition(".")
        layer, expert, _ = parent.partition(".experts.")
        if expert:
            groups.setdefault((layer, "experts"), []).append(name)
            continue
        for number, members in enumerate(_FUSED):
            if local in members:
                groups.setdefault((parent, number), []).append(name)
    return [group for group in groups.values() if len(group) > 1]
