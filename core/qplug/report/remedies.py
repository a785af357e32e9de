"""What to do about layers with large errors: options of ``qplug quantize`` that the backend serves.

A layer can be stored in more bits, together with the layers that engines merge with it. A recipe
can have an algorithm that chooses better codes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from qplug.api import Exporter
from qplug.api.scheme import Scheme, preset
from qplug.checkpoint.locate import as_word
from qplug.errors import QplugError
from qplug.reading.folder import Folder
from qplug.recipe.recipe import Recipe
from qplug.recipe.typed_options import quantize_options

#: The part of a name between a layer and the number of its expert.
_EXPERTS = ".experts."


def more_bits(folder: Folder, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns the options that store each of ``names`` in more bits, or leave it float, by name.

    The backend of ``folder`` serves the result. A layer for which there is no such option is left
    out.
    """
    exporter = folder.exporter
    assert exporter is not None
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        group = _group(name, folder, exporter)
        for scheme in _wider(folder.schemes[name]):
            changed = {
                n: scheme if n in group else own
                for n, own in folder.schemes.items()
                if scheme is not None or n not in group
            }
            if exporter.refuses(folder.view, {n: s for n, s in changed.items() if s}) is None:
                found[name] = tuple(_options(group, scheme))
                break
    return found


def _group(name: str, folder: Folder, exporter: Exporter[Any]) -> list[str]:
    """Returns the layers that must have the scheme of ``name``, itself among them."""
    layer, expert, _ = name.partition(_EXPERTS)
    if expert:
        return [other for other in folder.schemes if other.startswith(layer + _EXPERTS)]
    for group in exporter.merged([*folder.schemes]):
        if name in group:
            return group
    return [name]


def _wider(scheme: Scheme) -> Iterator[Scheme | None]:
    """Yields schemes of eight bits with inputs like those of ``scheme``; then None, for float."""
    inputs = scheme.activations
    if scheme.weights.bits < 8:
        names = ("W8A16",) if inputs is None else ("FP8_DYNAMIC", "W8A8")
        yield from map(preset, names if inputs is None or inputs.is_float else names[::-1])
    yield None


def _options(group: Sequence[str], scheme: Scheme | None) -> Iterator[str]:
    layer, expert, _ = group[0].partition(_EXPERTS)
    for pattern in [f"{layer}{_EXPERTS}*"] if expert else group:
        yield from (
            ("--ignore", pattern)
            if scheme is None
            else (
                "--override",
                f"{pattern}={scheme.name}",
            )
        )


def command(
    recipe: Recipe, model: str, out: str, *, options: Iterable[str] = (), algorithm: str = ""
) -> str | None:
    """Returns a command for a shell that quantizes ``model`` by ``recipe``, changed, into ``out``.

    Each option is on a line of its own.

    ``options`` are added; ``algorithm`` replaces the algorithms of the recipe and their options.
    None is returned if no options spell the recipe.
    """
    if algorithm:
        recipe = replace(recipe, algorithms=tuple(algorithm.split("+")), algorithm_options={})
    try:
        words = quantize_options(recipe)
    except QplugError:
        return None
    lines = [["qplug", "quantize", as_word(model)]]
    for word in (*words, *options, "--out", as_word(out)):
        if word.startswith("-"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(map(shlex.join, lines))
