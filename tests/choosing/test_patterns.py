"""A chosen assignment becomes patterns that give it back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qplug.choosing.patterns import patterns
from qplug.recipe.assign import matches

NAMES = [
    *(f"model.layers.{n}.self_attn.{local}" for n in range(12) for local in ("q_proj", "o_proj")),
    *(f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(3) for e in range(3)),
    "lm_head",
]


@settings(max_examples=25)
@given(st.sets(st.sampled_from(NAMES)))
def test_they_match_these_names_alone(names: set[str]) -> None:
    found = list(patterns(names, NAMES))
    assert {name for name in NAMES if any(matches(p, name) for p in found)} == names


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ([n for n in NAMES if n.endswith("q_proj")], "model.layers.*.self_attn.q_proj"),
        (
            [n for n in NAMES if n.endswith("q_proj") and ".1" in n],
            r"re:model\.layers\.(1|10|11)\.self_attn\.q_proj",
        ),
        (
            [n for n in NAMES if ".1.mlp" in n],
            r"re:model\.layers\.(1)\.mlp\.experts\.\d+\.up_proj",
        ),
    ],
)
def test_they_are_short(names: list[str], pattern: str) -> None:
    assert list(patterns(names, NAMES)) == [pattern]
