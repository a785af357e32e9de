"""The command line options of a recipe, derived from the fields of ``Recipe``."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import click

from qplug.api.params import parse_pairs
from qplug.cli.choice import Choice
from qplug.cli.completion import algorithms, backends, datasets, schemes
from qplug.cli.headed import HeadedOption
from qplug.recipe.words import RecipeWords, Word, words

F = TypeVar("F", bound=Callable[..., Any])

_KEY = "qplug.recipe"
_USUAL = "qplug.usual"

#: Completes the values of a keyword, by its name.
_COMPLETED = {"algo": algorithms, "scheme": schemes, "backend": backends, "dataset": datasets}

#: What the command line takes besides what recipes take, by the name of the keyword.
_MORE = {
    "algo": "{} Without it: what plugins suggest, gptq for weights of up to 4 bits, else rtn.",
    "dataset": "{} auto is wikitext2 if it can be read, else demo. Without it: auto if the Hub "
    "answers, or demo for qplug:demo.",
}


def recipe_options(command: F) -> F:
    """Add the options of a recipe to ``command``, which reads their values with ``typed_words``."""
    headings = list(dict.fromkeys(word.heading for word in words()))  # once each in --help
    ordered = sorted(words(), key=lambda word: headings.index(word.heading))
    for word in reversed(ordered):
        command = _option(word)(command)
    return command


def typed_words(ctx: click.Context) -> RecipeWords:
    """The recipe options that the user typed, by keyword; defaults are left out."""
    return cast("RecipeWords", ctx.meta.get(_KEY, {}))


def usual_words(ctx: click.Context) -> RecipeWords:
    """The recipe options of the user's own defaults that the user did not type, by keyword."""
    return cast("RecipeWords", ctx.meta.get(_USUAL, {}))


def _option(word: Word) -> Callable[[F], F]:
    kind, param = _bare(word.key.kind), word.param
    several = param.adds or get_origin(kind) is Mapping
    default = word.key.default
    return click.option(
        word.key.field.flag,
        word.name,
        cls=HeadedOption,
        heading=word.heading,
        expose_value=False,
        callback=_remember(word),
        type=_click_type(kind, param.min),
        is_flag=kind is bool,
        multiple=several,
        metavar=param.metavar or ("K=V" if several else None),
        default=None if several else "+".join(default) if isinstance(default, list) else default,
        show_default=not several and kind is not bool and word.name != "algo",
        help=_MORE.get(word.name, "{}").format(param.help),
        shell_complete=_COMPLETED.get(word.name),
    )


def _bare(kind: Any) -> Any:
    """The first type of a union that is not None; a type that is no union is returned as it is."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(member for member in get_args(kind) if member is not type(None))
    return kind


def _click_type(kind: Any, least: float | None) -> Any:
    if get_origin(kind) is Literal:
        return Choice([str(choice) for choice in get_args(kind)])
    if kind is int:
        return click.INT if least is None else click.IntRange(int(least))
    return {float: click.FLOAT, bool: click.BOOL}.get(kind, click.STRING)


def _remember(word: Word) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A click callback that stores the value of ``word`` if the user typed or configured it."""

    def remember(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        source = ctx.get_parameter_source(word.name)
        if source is not click.core.ParameterSource.DEFAULT:
            usual = source is click.core.ParameterSource.DEFAULT_MAP
            ctx.meta.setdefault(_USUAL if usual else _KEY, {})[word.name] = _value(word, value)

    return remember


def _value(word: Word, value: Any) -> Any:
    """The value of an option in the form of the same keyword of ``qplug.quantize``."""
    flag, metavar = word.key.field.flag, word.param.metavar or ""
    if metavar.startswith("ALGO."):
        return _by_algorithm(value, flag)
    if get_origin(word.key.kind) is Mapping or "=" in metavar:
        return parse_pairs(value, flag)
    return value


def _by_algorithm(pairs: Iterable[str], flag: str) -> dict[str, dict[str, str]]:
    options: dict[str, dict[str, str]] = {}
    for key, value in parse_pairs(pairs, flag).items():
        algorithm, dot, option = key.partition(".")
        if not (dot and option):
            raise click.BadParameter(f"{key}={value}: write ALGO.PARAM=V", param_hint=flag)
        options.setdefault(algorithm, {})[option] = value
    return options
