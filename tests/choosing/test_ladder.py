"""What a block can be raised to: the nearest wider schemes that are served, then float weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from small_models import Family

from qplug.api import ModelView
from qplug.api.scheme import Scheme, preset
from qplug.checkpoint.open import open_checkpoint
from qplug.choosing.candidates import served_schemes
from qplug.choosing.ladder import Ladder, find_ladder
from qplug.model.view import model_view
from qplug.registry.registry import Registry


def ladder_of(folder: Path, scheme: Scheme) -> Ladder:
    view = model_view(open_checkpoint(folder))
    exporter = Registry.installed().exporters.make("compressed-tensors", {})
    assigned = {name: scheme for name in view.linears if name in view.quantizable}
    return find_ladder(assigned, served_schemes(exporter), view, exporter)


def names(ladder: Ladder) -> list[set[str]]:
    """The names of the schemes of each level of the first block."""
    levels = next(iter(ladder.levels.values()))
    return [{"float" if s is None else s.name for s in level.values()} for level in levels]


@pytest.mark.parametrize(
    ("scheme", "levels"),
    [
        ("W2A16", ["W4A16", "W8A16", "float"]),
        ("W4A16", ["W8A16", "float"]),
        ("W4A8", ["W8A8", "float"]),
        ("NVFP4", ["FP8_DYNAMIC", "float"]),
        ("NVFP4A16", ["W8A16", "float"]),
        ("W8A8", ["float"]),
    ],
)
def test_the_nearest_wider_scheme_comes_first(
    scheme: str, levels: list[str], family: Family
) -> None:
    given = preset(scheme)
    sized = given.with_group_size(32) if given.weights.group_size == 128 else given
    found = ladder_of(family("qwen3-moe"), sized)
    assert names(found) == [{name} for name in levels]


def test_a_level_that_the_backend_refuses_beside_the_others_is_left_out(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = type(Registry.installed().exporters.make("compressed-tensors", {}))

    def refuses(self: Any, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        return "mixes nothing" if len({*schemes.values()}) > 1 else None

    monkeypatch.setattr(exporter, "refuses", refuses)
    found = ladder_of(family("qwen3-moe"), preset("W4A16").with_group_size(32))
    assert names(found) == [{"float"}]
    assert found.refusal == "mixes nothing"
