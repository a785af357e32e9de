"""What ``qplug quantize`` chooses for a user who does not say it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug.cli.hub_access import hub_answers

if TYPE_CHECKING:
    from pathlib import Path

    from qplug.recipe.words import RecipeWords
    from qplug.registry.registry import Registry

#: The scheme whose usual algorithm ``--scheme auto`` gets.
_FOR_AUTO = "W4A16"

#: ``--dataset auto`` is the first of these that can be read.
AUTO = "auto"
_DATASETS = ("wikitext2", "demo")
#: How long the Hub may take to answer before ``demo`` is taken.
_PATIENCE = 1.0  # seconds


def chosen_algorithm(words: RecipeWords, registry: Registry) -> str | None:
    """Returns the algorithm for a recipe of ``words`` that names none; None for the usual one.

    Plugins suggest it; ``auto``, which chooses schemes of few bits, gets the one of W4A16. Raises
    QplugError for a scheme or a backend that is none.
    """
    from qplug.api.scheme import preset
    from qplug.recipe.recipe import Recipe
    from qplug.recipe.words import changed
    from qplug.registry.suggestions import PLAIN, usual_algorithm

    if words.get("algo") is not None:
        return None
    recipe = changed(Recipe(), words)
    if registry.exporters[recipe.backend].format.stores_float:
        return None
    scheme = preset(_FOR_AUTO) if recipe.is_auto else recipe.scheme
    usual = usual_algorithm(scheme, registry)
    is_there = {*usual.split("+")} <= {*registry.algorithms}
    return usual if usual != PLAIN and is_there else None


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


def better_dataset(
    words: RecipeWords, model: str, out: Path, registry: Registry, *, overwrite: bool
) -> tuple[str, str] | None:
    """Returns a dataset for a run of ``words`` that names none, and one line that says why.

    None for the default of recipes, the text of the demo model, which is unlike what other models
    read. If the Hub answers, the run gets one of the Hub's texts. A run into ``out`` that was begun
    keeps its dataset, unless ``overwrite``; processes that share a run keep the default, since they
    might not agree.
    """
    from qplug.checkpoint.locate import DEMO
    from qplug.machine.launch import Launch
    from qplug.output.unfinished import begun_dataset

    if {"dataset", "dataset_options"} & words.keys() or model == DEMO:
        return None
    if Launch.of().count > 1 or not _needs_data(words, registry):
        return None
    *better, last = _DATASETS
    begun = None if overwrite else begun_dataset(out)
    if begun is not None:
        line = f"--dataset {begun}: as in the run that was begun in {out}"
        return (begun, line) if begun in better else None
    if not hub_answers(_PATIENCE):
        return None
    name, _ = chosen_dataset(registry)
    line = f"--dataset {name}: chosen, since --dataset is not given and the Hub answers"
    return (name, line) if name != last else None


def _needs_data(words: RecipeWords, registry: Registry) -> bool:
    from qplug.recipe.recipe import Recipe
    from qplug.recipe.words import changed

    recipe = changed(Recipe(), words)
    return recipe.stores_ranges or any(
        registry.algorithms[name].needs_data for name in recipe.algorithms
    )
