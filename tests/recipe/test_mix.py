"""Mixes of datasets, as words."""

from __future__ import annotations

import pytest

from qplug import QplugError
from qplug.recipe.mix import Share, shares_of
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.words import changed


def test_one_dataset_takes_all_samples() -> None:
    assert shares_of("text", {"path": "a"}, 128) == (Share("text", 128, {"path": "a"}),)
    assert shares_of("text:128", {"path": "a"}, 128) == (Share("text", 128, {"path": "a"}),)


def test_several_datasets_have_numbers_and_options() -> None:
    options = {"text.path": "a", "wiki.path": "b", "wiki.order": "random"}
    assert shares_of("text:96 + wiki=text:32", options, 128) == (
        Share("text", 96, {"path": "a"}),
        Share("text", 32, {"path": "b", "order": "random"}),
    )


def test_without_numbers_the_rest_is_shared() -> None:
    assert [share.count for share in shares_of("a+b+c", {}, 8)] == [3, 3, 2]
    assert [share.count for share in shares_of("a:5+b+c", {}, 8)] == [5, 2, 1]


@pytest.mark.parametrize(
    ("mix", "options", "message"),
    [
        ("a+", {}, r"--dataset a\+: write one dataset, or several as in"),
        ("a:x+b", {}, "write one dataset, or several"),
        ("", {}, "write one dataset"),
        ("a:4+b:5", {}, r"--dataset a:4\+b:5: its numbers must .* add up to --samples 8"),
        ("a:4", {}, "add up to --samples 8"),
        ("a:0+b:8", {}, "must be 1 or more"),
        ("a:8+b", {}, "leave some of --samples 8"),
        ("a+a", {}, r"give equal datasets labels, as in a=text:64\+b=text:64"),
        ("a+b", {"path": "x"}, r"--dataset-opt path: say whose option it is: a\.path, b\.path"),
        ("a+b", {"c.path": "x"}, r"say whose option it is: a\.path, b\.path"),
    ],
)
def test_another_spelling_is_refused_in_one_line(
    mix: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(QplugError, match=message):
        shares_of(mix, options, 8)
    with pytest.raises(QplugError, match=message):
        changed(Recipe(), {"dataset": mix, "dataset_options": options, "samples": 8})


def test_another_dataset_starts_without_options() -> None:
    recipe = Recipe(calibration=Calibration("a+b", {"a.path": "x"}, samples=8))
    new = changed(recipe, {"dataset": "a:6+c:2"}).calibration
    assert new is not None
    assert new.shares == (Share("a", 6, {}), Share("c", 2, {}))
