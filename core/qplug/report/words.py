"""Formats numbers and recipes for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qplug.api.params import fields_of
from qplug.api.scheme import QuantArgs, Scheme
from qplug.recipe.budget import Budget
from qplug.recipe.recipe import Calibration, Recipe

if TYPE_CHECKING:
    from qplug.reading.perplexity import Evaluation


def size(count: float) -> str:
    """Formats a number of bytes in decimal units: ``1.5 MB``."""
    if abs(count) >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    if not count:
        return "0"
    return f"{count / 1e6:,.1f} MB" if abs(count) >= 1e6 else f"{count / 1e3:,.1f} kB"


def number(value: float | None) -> str:
    """Formats a number with four digits; None as a dash."""
    return "-" if value is None else f"{value:.4g}"


def bits(value: float | None) -> str:
    """Formats a number with three decimals, as ``qplug inspect`` does; None as a dash."""
    return "-" if value is None else f"{value:.3f}"


def span(low: float, high: float) -> str:
    """Formats the smallest and the largest of some values."""
    return f"{low:.4g} … {high:.4g}"


def text_of(result: Evaluation) -> str:
    """Describes the text that a perplexity was measured on."""
    return f"{result.windows} windows of {result.seq_len} tokens of {result.dataset}"


def recipe_rows(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row for each field of a recipe (``Recipe.to_dict``) that has a value: keyword and words."""
    return list(_rows(Recipe.from_dict(recipe)))


def _rows(part: Recipe | Calibration | Budget) -> Iterator[tuple[str, str]]:
    for field in fields_of(type(part)):
        value = getattr(part, field.name)
        if isinstance(value, Budget):
            yield from _rows(value) if value.limits else ()
        elif isinstance(value, Calibration):
            yield from _rows(value)
        elif words := _words(value):
            yield field.word.replace("_", " "), words


def _words(value: Any) -> str:
    """The value of a field of a recipe; "" for what is not set."""
    if value is None or isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, Scheme):
        inputs = _args(value.activations) if value.activations else "as they are"
        return f"{value.name}; weights: {_args(value.weights)}; inputs: {inputs}"
    if isinstance(value, QuantArgs):
        return _args(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={own}" for key, own in _flat(value))
    if isinstance(value, tuple):
        return ", ".join(map(_member, value))
    return str(value)


def _member(item: str | tuple[str, Scheme]) -> str:
    return item if isinstance(item, str) else f"{item[0]}: {item[1].name}"


def _flat(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options by name, those of several components by ``component.name``."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", own) for key, own in value.items())
        else:
            yield name, value


def _args(args: QuantArgs) -> str:
    shared = {
        "tensor": "one scale",
        "channel": "a scale each row",
        "token": "a scale each token",
        "group": f"groups of {args.group_size}",
        "block": f"blocks of {' x '.join(map(str, args.block or ()))}",
    }
    words = [args.dtype, shared[args.strategy]]
    return ", ".join(words if args.symmetric else [*words, "asymmetric"])
