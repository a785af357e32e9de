"""Linears whose shapes no kernel takes: they stay float, if they are few and nobody named them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qplug.api import Exporter, ModelView
from qplug.api.scheme import Scheme
from qplug.checkpoint.names import kind_of
from qplug.errors import QplugError
from qplug.model.float_share import LIMIT, FloatShare, weight_sizes
from qplug.numerics.scales import check_widths
from qplug.recipe.assign import matches
from qplug.recipe.recipe import Recipe

_NUMBER = re.compile(r"\d+")


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
    share: FloatShare,
) -> None:
    """Raises QplugError, since too many weights are in linears of ``schemes`` that are ``narrow``.

    ``narrow`` is the result of ``find_narrow``, ``share`` what stays float then. The error tells
    what decides: the reason with most weights, and others if too many weights stay float without
    that one, each with its first linear.
    """
    sizes = dict(weight_sizes(view))
    reasons = list(_reasons(view, schemes, narrow))
    weights = [sum(sizes.get(name, 0) for name in reason.linears) for reason in reasons]
    excess = (share.silent - LIMIT) * sum(sizes.values())
    deciding = []
    for weight, reason in sorted(zip(weights, reasons, strict=True), key=lambda each: -each[0]):
        if excess > 0:
            deciding.append(reason)
            excess -= weight
    if deciding[0].is_width:  # the user mends it, and reads of others then
        raise QplugError(deciding[0].sentence)
    linears = (name for reason in deciding if not reason.is_width for name in reason.linears)
    kinds = dict.fromkeys(kind_of(f"{linear}.").removesuffix(".") for linear in linears)
    options = " ".join(f"--ignore '{kind}'" for kind in kinds)
    raise QplugError(
        f"{exporter.name}: {' and '.join(reason.sentence for reason in deciding)}; to keep such "
        f"linears float, pass {options}"
    )


@dataclass
class _Reason:
    """Why ``linears`` stay float: a sentence on one of them, with its name.

    ``is_width``: whether groups do not divide their widths, which is so for every exporter.
    """

    sentence: str
    is_width: bool
    linears: list[str] = field(default_factory=list)


def _reasons(
    view: ModelView, schemes: Mapping[str, Scheme], narrow: Mapping[str, str]
) -> Iterable[_Reason]:
    """The reasons in ``narrow``, of which those that differ in numbers are one."""
    found: dict[str | None, _Reason] = {}
    for linear in schemes:
        if linear in narrow:
            name = _cause(linear, narrow)
            width = _divided(name, view, schemes[name])
            sentence = narrow[name] if width is None else width
            key = _NUMBER.sub("*", sentence) if width is None else None
            reason = found.setdefault(key, _Reason(f"{name}: {sentence}", key is None))
            reason.linears.append(linear)
    return found.values()


def _cause(name: str, narrow: Mapping[str, str]) -> str:
    """The linear because of which ``name`` stays float: another one, if its sentence names it."""
    seen = {name}
    while other := next((n for n in _words(narrow[name]) if n in narrow and n not in seen), None):
        seen.add(other)
        name = other
    return name


def _words(sentence: str) -> Iterable[str]:
    return (word.strip(",;:") for word in sentence.split())


def _divided(name: str, view: ModelView, scheme: Scheme) -> str | None:
    try:
        check_widths(name, view.linears[name][1], scheme)
    except QplugError as error:
        return str(error).removeprefix(f"{name}: ")
    return None
