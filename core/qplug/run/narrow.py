"""Linears whose shapes no kernel takes: they stay float, if they are few and nobody named them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qplug.api import Exporter, ModelView
from qplug.api.scheme import Scheme
from qplug.checkpoint.names import kind_of
from qplug.errors import QplugError
from qplug.numerics.scales import check_widths
from qplug.recipe.assign import matches
from qplug.recipe.recipe import Recipe


def find_narrow(
    recipe: Recipe, view: ModelView, schemes: Mapping[str, Scheme], exporter: Exporter[Any]
) -> dict[str, str]:
    """Returns why linears among ``schemes`` have to stay float, by name: no kernel takes them.

    Groups that do not divide the width of a linear are a reason for every exporter. Raises
    QplugError if such a linear is one that an override of ``recipe`` names.
    """
    narrow = exporter.too_narrow(view, schemes)
    for name, scheme in schemes.items():
        if name not in narrow and (sentence := _divided(name, view, scheme)) is not None:
            narrow[name] = sentence
    for name, sentence in narrow.items():
        if any(matches(pattern, name) for pattern, _ in recipe.overrides):
            raise QplugError(f"{exporter.name}: {name}: {sentence}")
    return narrow


def refuse_narrow(
    view: ModelView,
    schemes: Mapping[str, Scheme],
    narrow: Mapping[str, str],
    exporter: Exporter[Any],
) -> None:
    """Raises QplugError for the first linear of ``schemes`` that is ``narrow``: these are too many.

    ``narrow`` is the result of ``find_narrow``.
    """
    for name in schemes:
        if name in narrow:
            check_widths(name, view.linears[name][1], schemes[name])
    name = next(iter(narrow))
    kinds = dict.fromkeys(kind_of(f"{linear}.").removesuffix(".") for linear in narrow)
    options = " ".join(f"--ignore '{kind}'" for kind in kinds)
    raise QplugError(
        f"{exporter.name}: {name}: {narrow[name]}; to keep such linears float, pass {options}"
    )


def _divided(name: str, view: ModelView, scheme: Scheme) -> str | None:
    try:
        check_widths(name, view.linears[name][1], scheme)
    except QplugError as error:
        return str(error).removeprefix(f"{name}: ")
    return None
