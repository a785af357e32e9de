"""The options of ``qplug quantize`` that make a recipe: the inverse of typing them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from qplug.api.params import Field, fields_of
from qplug.api.scheme import QuantArgs, Scheme
from qplug.errors import QplugError
from qplug.recipe.budget import Budget
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.spellings import CACHE, SCHEME, SchemePart


def quantize_options(recipe: Recipe) -> list[str]:
    """Returns the words that ``qplug quantize`` reads as ``recipe``; defaults are left out.

    Raises QplugError for a scheme that only a file can spell, such as one without a name.
    """
    parts: list[tuple[Any, Any]] = [(recipe, Recipe())]
    if recipe.calibration is not None:
        parts.append((recipe.calibration, Calibration()))
    return [word for part, usual in parts for word in _options(part, usual)]


def _options(
    part: Recipe | Calibration | Budget, usual: Recipe | Calibration | Budget
) -> Iterator[str]:
    for field in fields_of(type(part)):
        value = getattr(part, field.name)
        if isinstance(value, Budget):
            yield from _options(value, Budget())
        elif value != getattr(usual, field.name) and not isinstance(value, Calibration | None):
            yield from _option(field, value)


def _option(field: Field, value: Any) -> Iterator[str]:
    if isinstance(value, Scheme):
        yield from _scheme(value)
    elif isinstance(value, QuantArgs):
        yield from (field.flag, str(CACHE.write(SimpleNamespace(kv_cache=value))))
    elif isinstance(value, bool):
        yield field.flag
    elif isinstance(value, Mapping):
        for key, own in _flat(value):
            yield from (field.flag, f"{key}={own}")
    elif field.name == "algorithms":
        yield from (field.flag, "+".join(value))
    elif isinstance(value, tuple):
        for item in value:
            yield from (field.flag, item if isinstance(item, str) else _override(*item))
    else:
        yield from (field.flag, str(value))


def _scheme(scheme: Scheme) -> Iterator[str]:
    written = SCHEME.write(SimpleNamespace(scheme=scheme))
    if isinstance(written, str):
        yield from ("--scheme", written)
        return
    assert isinstance(written, SchemePart)
    if written.preset is None:
        raise QplugError(f"{scheme.name}: no option spells this scheme; use a recipe file")
    yield from ("--scheme", written.preset, "--group-size", str(written.group_size))


def _override(pattern: str, scheme: Scheme) -> str:
    written = SCHEME.write(SimpleNamespace(scheme=scheme))
    if not isinstance(written, str):
        raise QplugError(f"{scheme.name}: no option spells this override; use a recipe file")
    return f"{pattern}={written}"


def _flat(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, own in options.items():
        if isinstance(own, Mapping):
            yield from ((f"{key}.{name}", value) for name, value in own.items())
        elif own is not None:
            yield key, own
