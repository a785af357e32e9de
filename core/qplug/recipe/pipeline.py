"""Creates the algorithms of a run, and checks that they fit each other and the schemes.

The checks ask the algorithms: what they decide, whether they rewrite the model or choose codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

from qplug.api import Algorithm
from qplug.api.scheme import Scheme
from qplug.errors import QplugError, did_you_mean
from qplug.registry.registry import Registry


def make_pipeline(
    names: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    schemes: Sequence[Scheme],
    registry: Registry,
) -> list[Algorithm[Any]]:
    """Create the algorithms called ``names``, in order, for a recipe with ``schemes``.

    ``options`` has the options of each algorithm by its name. Raises QplugError if a name or an
    option is wrong, or if the algorithms do not fit each other or the schemes.
    """
    refuse_strangers(names, options)
    pipeline = [registry.algorithms.make(name, options.get(name)) for name in names]
    check_pipeline(pipeline, schemes, registry)
    return pipeline


def refuse_strangers(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise QplugError if ``options`` name an algorithm that is not in the pipeline."""
    for name in options:
        if name not in names:
            hint = did_you_mean(name, names)
            raise QplugError(f"-o {name}...: {name} is not in --algo{hint and '.' + hint}")


def check_pipeline(
    pipeline: Sequence[Algorithm[Any]], schemes: Sequence[Scheme], registry: Registry
) -> None:
    """Raise QplugError if the algorithms do not fit each other or ``schemes``."""
    flag = f"--algo {'+'.join(algorithm.name for algorithm in pipeline)}"
    _check_order(pipeline, flag)
    decided = []
    for algorithm in pipeline:
        with registry.blaming(algorithm, "decides"):
            decided.append(frozenset(algorithm.decides))
    for (earlier, first), (later, second) in combinations(zip(pipeline, decided, strict=True), 2):
        for choice in sorted(first & second):
            raise QplugError(
                f"{flag}: {earlier.name} and {later.name} both decide {choice}, so {later.name} "
                f"would undo what {earlier.name} chose; leave one of them out"
            )
    for algorithm in pipeline:
        with registry.blaming(algorithm, "refuses"):
            sentence = algorithm.refuses(schemes)
        if sentence is not None:
            raise QplugError(f"{algorithm.name}: {sentence}")


def _check_order(pipeline: Sequence[Algorithm[Any]], flag: str) -> None:
    """Check that algorithms that rewrite the model come first, and one that chooses codes last."""
    for earlier, later in pairwise(pipeline):
        if later.prepares() and not earlier.prepares():
            raise QplugError(
                f"{flag}: {later.name} rewrites the float model, so it comes before {earlier.name}"
            )
    quantizers = [algorithm.name for algorithm in pipeline if algorithm.quantizes()]
    if len(quantizers) > 1:
        names = " and ".join(quantizers)
        raise QplugError(f"{names} both choose codes; a pipeline has at most one such algorithm")
    for earlier, later in pairwise(pipeline):
        if earlier.quantizes():
            raise QplugError(
                f"{flag}: {earlier.name} chooses codes, so it comes after {later.name}"
            )
