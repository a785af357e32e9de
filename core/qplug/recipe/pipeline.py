"""The algorithms of a run, in order, and whether they make sense together: by what each says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

from qplug.api import Algorithm
from qplug.api.scheme import Scheme
from qplug.errors import QplugError
from qplug.registry.registry import Registry


def make_pipeline(
    names: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    schemes: Sequence[Scheme],
    registry: Registry,
) -> list[Algorithm[Any]]:
    """The algorithms called ``names``, for a recipe that has ``schemes``.

    Raises QplugError if a name or an option is wrong, or if they make no sense together or for
    these schemes.
    """
    refuse_strangers(names, options)
    pipeline = [registry.algorithms.make(name, options.get(name)) for name in names]
    check_pipeline(pipeline, schemes)
    return pipeline


def refuse_strangers(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises QplugError if there are ``options`` for an algorithm that is not in the pipeline."""
    for name in options:
        if name not in names:
            raise QplugError(f"-o {name}...: {name} is not in --algo")


def check_pipeline(pipeline: Sequence[Algorithm[Any]], schemes: Sequence[Scheme]) -> None:
    """Raises QplugError if algorithms make no sense together or for ``schemes``."""
    told = f"--algo {'+'.join(algorithm.name for algorithm in pipeline)}"
    _check_order(pipeline, told)
    for one, other in combinations(pipeline, 2):
        for choice in sorted(one.decides & other.decides):
            raise QplugError(
                f"{told}: {one.name} and {other.name} both settle {choice}, so the later would "
                "undo what the earlier chose; leave one out"
            )
    for algorithm in pipeline:
        sentence = algorithm.refuses(schemes)
        if sentence is not None:
            raise QplugError(f"{algorithm.name}: {sentence}")


def _check_order(pipeline: Sequence[Algorithm[Any]], told: str) -> None:
    """First what rewrites the float model, last what chooses codes: one at most."""
    for earlier, later in pairwise(pipeline):
        if later.prepares() and not earlier.prepares():
            raise QplugError(
                f"{told}: {later.name} rewrites the float model, so it comes before {earlier.name}"
            )
    quantizers = [algorithm.name for algorithm in pipeline if algorithm.quantizes()]
    if len(quantizers) > 1:
        names = " and ".join(quantizers)
        raise QplugError(f"{names} both choose codes; a pipeline can have one that does")
    for earlier, later in pairwise(pipeline):
        if earlier.quantizes():
            raise QplugError(
                f"{told}: {earlier.name} chooses codes, so it comes after {later.name}"
            )
