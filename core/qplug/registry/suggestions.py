"""Finds what plugins suggest for a scheme: the one place where qplug prefers an algorithm."""

from __future__ import annotations

from typing import get_args

from qplug.api.scheme import Scheme
from qplug.api.suggestion import Kind, Suggestion, kind_of_scheme
from qplug.registry.border import keeping_error
from qplug.registry.registry import Registry

#: What a user gets for whom no plugin suggests anything. It needs no data.
PLAIN = "rtn"


def suggestions(scheme: Scheme, registry: Registry) -> list[Suggestion]:
    """Returns what plugins suggest for ``scheme``, the least loss first. No torch is imported.

    A plugin that fails keeps its error and is left out.
    """
    kind, found = kind_of_scheme(scheme), list[Suggestion]()
    for plugin, call in registry.implementing("qplug_suggestions"):
        with keeping_error(plugin):
            answers = [answer for each in call() for answer in each]
            for answer in answers:
                _check(answer)
            found += [answer for answer in answers if answer.kind == kind]
    return sorted(found, key=lambda each: (each.loss, each.algorithms))


def _check(answer: object) -> None:
    if not isinstance(answer, Suggestion):
        raise TypeError(f"qplug_suggestions: {answer!r} is no qplug.Suggestion")
    if answer.kind not in get_args(Kind):
        known = ", ".join(get_args(Kind))
        raise ValueError(f"qplug_suggestions: no kind {answer.kind!r}; there are: {known}")


def usual_algorithm(scheme: Scheme, registry: Registry) -> str:
    """Returns the algorithms that a user gets for ``scheme`` who names none."""
    usual = (each.algorithms for each in suggestions(scheme, registry) if each.usual)
    return next(usual, PLAIN)


def better_algorithm(used: str, scheme: Scheme, registry: Registry) -> str | None:
    """Returns the suggestion for ``scheme`` with the least loss; None unless better than ``used``.

    Algorithms that no plugin suggests have an unknown loss, and None is returned for them; rounding
    to nearest has the loss 1. Algorithms that are not installed are left out; torch is imported.
    """
    found = suggestions(scheme, registry)
    losses = {PLAIN: 1.0} | {each.algorithms: each.loss for each in found}
    for each in found:
        if used not in losses or each.loss >= losses[used]:
            return None
        if {*each.algorithms.split("+")} <= {*registry.algorithms}:
            return each.algorithms
    return None
