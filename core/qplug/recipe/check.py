"""What is wrong with a job, as far as the model need not be known, and where in its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from qplug.api.params import fill
from qplug.errors import QplugError
from qplug.recipe.pipeline import check_pipeline, make_algorithm, refuse_strangers
from qplug.recipe.recipe import Calibration, Job
from qplug.registry.registry import Registry

T = TypeVar("T")


def check(job: Job, registry: Registry) -> None:
    """Raises QplugError for all that is known to be wrong without the model, with its place.

    Such are names and options that no plugin has, and a pipeline or a recipe that makes no sense.
    Widths and names of layers are not checked.
    """
    recipe = job.recipe
    _placed(job, "algorithms", refuse_strangers, recipe.algorithms, recipe.algorithm_options)
    pipeline = [
        _placed(
            job,
            f"algorithms.{name}",
            make_algorithm,
            name,
            recipe.algorithm_options.get(name, {}),
            registry,
        )
        for name in recipe.algorithms
    ]
    _placed(job, "algorithms", check_pipeline, pipeline, recipe.schemes)
    _check_components(job, registry)
    recipe.check()


def check_names(job: Job, registry: Registry) -> None:
    """Raises QplugError for a name or an option that no plugin has, with its place.

    Whether algorithms go together is not checked.
    """
    for name in job.recipe.algorithms:
        options = job.recipe.algorithm_options.get(name, {})
        _placed(job, f"algorithms.{name}", make_algorithm, name, options, registry)
    _check_components(job, registry)


def _check_components(job: Job, registry: Registry) -> None:
    """Raises QplugError for a dataset or an exporter that no plugin has, or their options."""

    def dataset(place: str, name: str, options: Mapping[str, Any]) -> None:
        kind = _placed(job, place, registry.datasets.__getitem__, name)
        _placed(job, place, fill, kind.Params, options, f"dataset {name}")

    def exporter(place: str, name: str, options: Mapping[str, Any]) -> None:
        kind = _placed(job, place, registry.exporters.__getitem__, name)
        _placed(job, place, fill, kind.Params, options, f"backend {name}")

    data = job.recipe.calibration
    if data is not None and ("calibration" in job.places or data != Calibration()):
        dataset("calibration", data.dataset, data.options)
    for number, export in enumerate(job.exports):
        recipe = job.recipe_for(export)
        exporter(f"exports.{number}", recipe.backend, recipe.backend_options)
    for number, told in enumerate(job.measurements):
        dataset(f"measurements.{number}", told.dataset, told.options)


def _placed(job: Job, place: str, call: Callable[..., T], *arguments: Any) -> T:
    """The result of ``call``; its QplugError begins with the place in the file, if it is known."""
    try:
        return call(*arguments)
    except QplugError as error:
        where = job.places.get(place)
        if where is not None and not str(error).startswith(where):
            raise QplugError(f"{where}: {error}") from error
        raise
