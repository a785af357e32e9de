"""What ``qplug quantize`` chooses for a user who does not say it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qplug.recipe.words import RecipeWords
    from qplug.registry.registry import Registry

#: For integer weights of at most ``_FEW_BITS``: benchmarks/RESULTS.md compares algorithms.
_CALIBRATED = "gptq"
_FEW_BITS = 4

#: ``--dataset auto`` is the first of these that can be read.
AUTO = "auto"
_DATASETS = ("wikitext2", "demo")


def chosen_algorithm(words: RecipeWords, registry: Registry) -> str | None:
    """Returns the algorithm for a recipe of ``words`` that names none; None for the usual one.

    Integers of at most 4 bits, which ``auto`` chooses too, lose much by rounding to nearest;
    calibration wins it back in part. Other schemes lose little. Raises QplugError for a scheme or
    a backend that is none.
    """
    from qplug.recipe.recipe import Recipe
    from qplug.recipe.words import changed

    if words.get("algo") is not None or _CALIBRATED not in registry.algorithms:
        return None
    recipe = changed(Recipe(), words)
    weights = recipe.scheme.weights
    if not recipe.is_auto and (weights.is_float or weights.bits > _FEW_BITS):
        return None
    if registry.exporters[recipe.backend].format.stores_float:
        return None
    return _CALIBRATED


def chosen_line(algorithm: str, words: RecipeWords) -> str:
    """Returns one line that says that ``algorithm`` was chosen, and what else there is."""
    from qplug.recipe.recipe import Recipe
    from qplug.recipe.words import changed

    scheme = changed(Recipe(), words).scheme.name
    return (
        f"--algo {algorithm}: chosen for {scheme}, since rounding to nearest (--algo rtn, faster, "
        "without data) loses more"
    )


def chosen_dataset(registry: Registry) -> tuple[str, str]:
    """Returns the dataset that ``--dataset auto`` is here, and one line that says so and why.

    Text of the Hub is downloaded into the Hub's cache. Raises QplugError if no text can be read.
    """
    from qplug.errors import QplugError

    *better, last = _DATASETS
    why = ""
    for name in better:
        try:
            next(iter(registry.datasets.make(name).documents("calibration")), None)
        except QplugError as error:
            why = f"{why}, since {name} cannot be read: {error}"
        else:
            return name, f"--dataset {AUTO}: {name}"
    return last, f"--dataset {AUTO}: {last}{why}"
