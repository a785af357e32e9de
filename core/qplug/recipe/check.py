"""What is wrong with a job, as far as the model need not be known, and where in its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from qplug.api import Algorithm, Component
from qplug.errors import QplugError
from qplug.recipe.pipeline import check_pipeline, refuse_strangers
from qplug.recipe.recipe import Calibration, Job
from qplug.registry.offers import Components
from qplug.registry.registry import Registry

T = TypeVar("T")
C = TypeVar("C", bound=Component[Any])


def check(job: Job, registry: Registry) -> None:
    """Raises QplugError for all that is known to be wrong without the model, with its place.

    Such are names and options that no plugin has, and a pipeline or a recipe that makes no sense.
    Widths and names of layers are not checked.
    """
    recipe = job.recipe
    _placed(job, "algorithms", refuse_strangers, recipe.algorithms, recipe.algorithm_options)
    pipeline = check_names(job, registry)
    _placed(job, "algorithms", check_pipeline, pipeline, recipe.schemes)
    recipe.check()


def check_names(job: Job, registry: Registry) -> list[Algorithm[Any]]:
    """The algorithms of ``job``, which may not go together.

    Raises QplugError for a name or an option that no plugin has, with its place.
    """

    def make(place: str, offers: Components[C], name: str, options: Mapping[str, Any]) -> C:
        return _placed(job, place, offers.make, name, options)

    recipe = job.recipe
    pipeline = [
        make(
            f"algorithms.{name}", registry.algorithms, name, recipe.algorithm_options.get(name, {})
        )
        for name in recipe.algorithms
    ]
    data = recipe.calibration
    if data is not None and ("calibration" in job.places or data != Calibration()):
        make("calibration", registry.datasets, data.dataset, data.options)
    for number, export in enumerate(job.exports):
        own = job.recipe_for(export)
        make(f"exports.{number}", registry.exporters, own.backend, own.backend_options)
    for number, text in enumerate(job.measurements):
        make(f"measurements.{number}", registry.datasets, text.dataset, text.options)
    return pipeline


def _placed(job: Job, place: str, call: Callable[..., T], *arguments: Any) -> T:
    """The result of ``call``; its QplugError begins with the place in the file, if it is known."""
    try:
        return call(*arguments)
    except QplugError as error:
        where = job.places.get(place)
        if where is not None and not str(error).startswith(where):
            raise QplugError(f"{where}: {error}") from error
        raise
