"""Writes an assignment of schemes to linears as the scheme, overrides and ignores of a recipe."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import prod

from qplug.api import ModelView
from qplug.api.scheme import Scheme
from qplug.checkpoint.names import kind_of
from qplug.recipe.assign import matches
from qplug.recipe.budget import Budget
from qplug.recipe.recipe import Recipe

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


def as_recipe(asked: Recipe, assigned: Mapping[str, Scheme | None], model: ModelView) -> Recipe:
    """``asked`` with patterns that give each linear the scheme that ``assigned`` gives it.

    None stands for float weights. The scheme of most weights becomes that of the recipe. Overrides
    and ignores of ``asked`` stay, after the new ones.
    """
    weight: Counter[Scheme] = Counter()
    for name, scheme in assigned.items():
        if scheme is not None:
            weight[scheme] += prod(model.linears[name])
    usual = max(weight, key=lambda scheme: (weight[scheme], scheme.name))
    others = [*model.linears, *model.other_weights]
    overrides = [
        (pattern, scheme)
        for scheme in dict.fromkeys(s for s in assigned.values() if s not in (None, usual))
        for pattern in patterns({n for n, s in assigned.items() if s == scheme}, others)
        if scheme is not None
    ]
    floats = {name for name, scheme in assigned.items() if scheme is None}
    return replace(
        asked,
        scheme=usual,
        overrides=(*overrides, *asked.overrides),
        ignore=(*asked.ignore, *patterns(floats, others)),
        budget=Budget(),
    )


def with_changes(
    recipe: Recipe, before: Mapping[str, Scheme], after: Mapping[str, Scheme], model: ModelView
) -> Recipe:
    """``recipe``, which assigns ``before``, with patterns after which it assigns ``after``.

    Linears that ``after`` lacks stay float.
    """
    others = [*model.linears, *model.other_weights]
    changed = {name: after.get(name) for name in before if before[name] != after.get(name)}
    overrides = [
        (pattern, scheme)
        for scheme in dict.fromkeys(s for s in changed.values() if s is not None)
        for pattern in patterns([n for n, s in changed.items() if s == scheme], others)
    ]
    floats = [name for name, scheme in changed.items() if scheme is None]
    return replace(
        recipe,
        overrides=(*recipe.overrides, *overrides),
        ignore=(*recipe.ignore, *patterns(floats, others)),
    )


def patterns(names: Collection[str], others: Collection[str]) -> Iterator[str]:
    """Yields patterns that match ``names`` and none of the ``others``, one for each kind of name.

    A kind is a name with a star for each number. ``others`` may contain ``names``.
    """
    strangers = [name for name in others if name not in names]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    for kind, members in sorted(kinds.items()):
        for pattern in (kind, _by_number(members)):
            if not any(matches(pattern, name) for name in strangers):
                yield pattern
                break
        else:
            yield from members


def _by_number(members: Collection[str]) -> str:
    """A regular expression that lists the first numbers of ``members``, and takes any later one."""
    first = sorted({int(found[0]) for name in members if (found := _NUMBER.findall(name))})
    text = re.escape(next(iter(members)))
    numbers = iter(["(" + "|".join(map(str, first)) + ")"])
    return "re:" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", lambda _: next(numbers, r"\d+"), text)
