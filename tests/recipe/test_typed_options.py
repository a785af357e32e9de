"""The options that spell a recipe are read back as the same recipe."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from qplug import QplugError, preset
from qplug.api.scheme import CACHES, QuantArgs, Scheme
from qplug.cli.recipe_options import recipe_options, typed_words
from qplug.recipe.budget import Budget
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.spellings import AUTO
from qplug.recipe.typed_options import quantize_options
from qplug.recipe.words import changed


def typed(words: list[str]) -> Recipe:
    """The recipe that ``qplug quantize`` reads from ``words``."""
    read: list[Recipe] = []

    @click.command()
    @recipe_options
    @click.pass_context
    def command(ctx: click.Context) -> None:
        read.append(changed(Recipe(), typed_words(ctx)))

    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    return read[0] if words else Recipe()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"algorithms": ("awq", "gptq"), "algorithm_options": {"awq": {"ratios": "4"}}},
        {"scheme": preset("W4A16").with_group_size(32), "backend": "vllm"},
        {"scheme": preset("FP8"), "kv_cache": CACHES["fp8"], "seed": 7, "use_qtorch": True},
        {"overrides": (("re:.*down_proj", preset("W8A16")),), "ignore": ("a", "b*")},
        {"scheme": AUTO, "budget": Budget(bits=4.5, sensitivity="divergence")},
        {"backend_options": {"gpu": "sm90", "tp": "2"}, "mtp": "quantize"},
    ],
)
def test_a_recipe_is_typed_and_read_back(fields: dict[str, Any]) -> None:
    recipe = Recipe(calibration=Calibration(dataset="text", options={"path": "a b"}), **fields)
    assert typed(quantize_options(recipe)) == recipe
    assert quantize_options(Recipe()) == []


def test_a_scheme_without_a_name_is_refused() -> None:
    scheme = Scheme("mine", QuantArgs("int4", "group", group_size=48, symmetric=False))
    for recipe in (Recipe(scheme=scheme), Recipe(overrides=(("*", scheme),))):
        with pytest.raises(QplugError, match="use a recipe file"):
            quantize_options(recipe)
