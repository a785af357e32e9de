"""Checks a job without its model, and names the place of a mistake in the job's file."""

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
    """Raise QplugError, with its place in the file, for a mistake that shows without the model.

    The checks cover names and options that no plugin has, algorithms that do not fit each other or
    a scheme, and fields that contradict each other. Widths and names of layers need the model, so
    they are not checked.
    """
    recipe = job.recipe
    _placed(job, "algorithms", refuse_strangers, recipe.algorithms, recipe.algorithm_options)
    pipeline = check_names(job, registry)
    _placed(job, "algorithms", check_pipeline, pipeline, recipe.schemes, registry)
    recipe.check()


def check_names(job: Job, registry: Registry) -> list[Algorithm[Any]]:
    """Create the algorithms of ``job``, in order, without checking that they fit each other.

    Raises QplugError, with its place in the file, for a name or an option that no plugin has.
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
        for share in data.shares:
            make("calibration", registry.datasets, share.dataset, share.options)
    for number, export in enumerate(job.exports):
        own = job.recipe_for(export)
        make(f"exports.{number}", registry.exporters, own.backend, own.backend_options)
    for number, text in enumerate(job.measurements):
        make(f"measurements.{number}", registry.datasets, text.dataset, text.options)
    return pipeline


def _placed(job: Job, place: str, call: Callable[..., T], *arguments: Any) -> T:
    """The result of ``call(*arguments)``; its QplugError names the place in the file, if known."""
    try:
        return call(*arguments)
    except QplugError as error:
        where = job.places.get(place)
        if where is not None and not str(error).startswith(where):
            raise QplugError(f"{where}: {error}") from error
        raise
