"""Assigns the schemes of a recipe to the linears of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from qplug.api import BuiltFloat, ModelView
from qplug.api.scheme import Scheme
from qplug.errors import QplugError
from qplug.recipe.recipe import Recipe


def assign(
    recipe: Recipe, model: ModelView, built_float: Mapping[str, BuiltFloat] | None = None
) -> dict[str, Scheme]:
    """The scheme of every linear that ``recipe`` quantizes, by name, in the model's order.

    A pattern is a glob over module names, or ``re:`` and a regular expression for the whole name.
    Later overrides win; ``ignore`` wins over all overrides. A linear in ``built_float``, which says
    why the engine builds it float, is quantized only if an override names it. Linears of draft
    layers are quantized if the recipe says so. Raises QplugError if
    a pattern matches no linear, or if no linear is quantized.
    """
    floats = built_float or {}
    ignored = _matching(recipe.ignore, [*model.linears, *model.other_weights], "--ignore")
    drafts = frozenset() if recipe.mtp == "quantize" else model.drafts
    wanted = model.quantizable - ignored - floats.keys() - drafts
    schemes = {name: recipe.scheme for name in model.linears if name in wanted}
    for pattern, scheme in recipe.overrides:
        for name in _matching([pattern], model.linears, "--override") - ignored - drafts:
            schemes[name] = scheme
    if not schemes:
        why = next((floats[name] for name in model.quantizable if name in floats), None)
        reason = f" ({why.reason})" if why is not None else ""
        raise QplugError(
            f"nothing is left to quantize: every linear layer of the model stays float{reason}"
        )
    return {name: recipe.rounding(schemes[name]) for name in model.linears if name in schemes}


def _matching(patterns: Iterable[str], names: Iterable[str], flag: str) -> set[str]:
    matching: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if matches(pattern, name)}
        if not hits:
            raise QplugError(f"{flag} {pattern}: matches no linear layer of the model")
        matching |= hits
    return matching


def matches(pattern: str, name: str) -> bool:
    """Whether the module ``name`` matches ``pattern``: a glob, or ``re:`` and a regular expression.

    A regular expression must match the whole name. Raises QplugError if it is malformed.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise QplugError(f"{pattern}: not a regular expression: {error}") from None
    return fnmatchcase(name, pattern)
