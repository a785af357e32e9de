"""Options of a component: a frozen dataclass, filled from the command line, YAML or Python.

A field is ``name: Annotated[type, Param("What it does.")] = default``. Types: ``bool``, ``int``,
``float``, ``str``, ``Path``, ``Literal[...]``, and any of them ``| None``. The fields of recipes
have more types: ``qplug.recipe.fields`` reads them from the same annotation.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from qplug.errors import QplugError, did_you_mean

T = TypeVar("T")

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SCALARS = (bool, int, float, str, Path)


@dataclass(frozen=True)
class Spelling:
    """How a field is written in files and on the command line, if its type is no type of files.

    ``kind`` is the type in files. ``read`` converts a value of that type into values of fields, by
    name. ``write`` converts the dataclass with the fields back into a value of that type. ``parse``
    converts a word of the command line or Python into the field's value. ``read`` and ``parse``
    raise QplugError for a wrong value.
    """

    kind: Any
    read: Callable[[Any], Mapping[str, Any]]
    write: Callable[[Any], Any]
    parse: Callable[[Any], Any]


@dataclass(frozen=True)
class Param:
    """What a field means, the bounds of its number, and the other names that files may use for it.

    ``help`` is a sentence for users. ``min`` and ``max`` are bounds, inclusive. ``also`` lists
    further names, such as older ones.

    The other attributes are for qplug's own recipe. In files: ``key`` is the key (by default the
    field's name; None if the field has no key), ``spelling`` the form of the value, and ``inline``
    says that the keys of the field's dataclass appear at the level of the field itself. On the
    command line and in Python: ``word`` is the keyword (by default the name), ``flag`` the option
    (by default ``--`` and the keyword), ``metavar`` the placeholder of its value; ``adds`` says
    that a value is appended to the earlier one. ``of`` names the field with the component that the
    value belongs to: if that component changes, the value returns to its default. ``heading`` is
    the section of ``--help`` that lists the option.
    """

    help: str
    min: float | None = None
    max: float | None = None
    also: tuple[str, ...] = ()
    _: dataclasses.KW_ONLY
    key: str | None = ""
    spelling: Spelling | None = None
    inline: bool = False
    word: str = ""
    flag: str = ""
    metavar: str | None = None
    adds: bool = False
    of: str = ""
    heading: str = ""


@dataclass(frozen=True)
class Field:
    """One field of a dataclass, with its type and its Param.

    ``default`` is ``dataclasses.MISSING`` for a required field.
    """

    name: str
    type: Any
    default: Any
    param: Param

    @property
    def required(self) -> bool:
        """Whether the field has no default."""
        return self.default is dataclasses.MISSING

    @property
    def word(self) -> str:
        """The keyword in Python."""
        return self.param.word or self.name

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return self.param.flag or f"--{self.word.replace('_', '-')}"


def fields_of(kind: type) -> tuple[Field, ...]:
    """The fields of the dataclass ``kind``, in order.

    Raises TypeError for a field without a Param.
    """
    return _fields(kind)


@cache
def _fields(kind: Any) -> tuple[Field, ...]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple(_field(kind, field, hints[field.name]) for field in dataclasses.fields(kind))


def _field(kind: type, field: dataclasses.Field[Any], hint: Any) -> Field:
    bare, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    param = next((extra for extra in extras if isinstance(extra, Param)), None)
    if param is None:
        where = f"{kind.__qualname__}.{field.name}"
        raise TypeError(f"{where} must be Annotated[type, Param('what it does')]")
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    return Field(field.name, bare, default, param)


def check_fields(owner: Any) -> None:
    """Raise QplugError if a field of ``owner`` is out of bounds, or none of its choices."""
    for field in fields_of(type(owner)):
        value, least = getattr(owner, field.name), field.param.min
        choices = get_args(field.type) if get_origin(field.type) is Literal else ()
        if choices and value not in choices:
            hint = did_you_mean(str(value), map(str, choices))
            names = ", ".join(map(str, choices))
            sentence = f"{field.flag} {value}: must be one of {names}{hint and '.' + hint}"
            raise QplugError(sentence)
        if least is not None and value is not None and value < least:
            raise QplugError(f"{field.flag} {value}: must be at least {least}")


@dataclass(frozen=True)
class Option:
    """One field of a ``Params`` dataclass, as an option.

    ``kind`` is bool, int, float, str or Path. ``choices`` are the values of a ``Literal``, empty
    for other types. ``optional`` says that the value may be None.
    """

    name: str
    kind: type
    choices: tuple[Any, ...]
    optional: bool
    default: Any
    param: Param

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.default is dataclasses.MISSING

    @property
    def type_name(self) -> str:
        """The type in words for users, such as ``int >= 1`` or ``v1|v2``."""
        none = " or none" if self.optional else ""
        if self.choices:
            return "|".join(str(choice) for choice in self.choices) + none
        low, high = self.param.min, self.param.max
        bounds = f" >= {low}" if low is not None else ""
        bounds += f" <= {high}" if high is not None else ""
        return self.kind.__name__.lower() + bounds + none


def options(params: type) -> list[Option]:
    """The options that the fields of ``params`` describe, in order.

    Raises TypeError if ``params`` is no frozen dataclass, or if a field cannot be an option.
    """
    if not (dataclasses.is_dataclass(params) and params.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise TypeError(f"{params.__qualname__} must be a frozen dataclass")
    known = [_option(params, field) for field in fields_of(params)]
    names = [_plain(name) for option in known for name in (option.name, *option.param.also)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TypeError(f"{params.__qualname__}: {', '.join(twice)} names two options")
    return known


def _option(params: type, field: Field) -> Option:
    where, hint, param = f"{params.__qualname__}.{field.name}", field.type, field.param
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        optional = len(members) < len(get_args(hint))
        if len(members) != 1:
            raise TypeError(f"{where}: {hint} cannot be an option")
        hint = members[0]
    choices: tuple[Any, ...] = ()
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        hint = type(choices[0])
    if hint not in _SCALARS:
        raise TypeError(f"{where}: {hint} cannot be an option")
    if (param.min, param.max) != (None, None) and (hint not in (int, float) or choices):
        raise TypeError(f"{where}: only a number can have bounds")
    option = Option(field.name, hint, choices, optional, field.default, param)
    if not option.required:
        try:
            convert(option, field.default, where)
        except QplugError as error:
            raise TypeError(f"{where}: its default is not allowed: {error}") from None
    return option


def parse_pairs(pairs: typing.Iterable[str], flag: str) -> dict[str, str]:
    """Parse ``KEY=VALUE`` words into a mapping from keys to values.

    Raises QplugError, whose message names ``flag``, for a word without ``=``.
    """
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise QplugError(f"{flag} {pair}: write KEY=VALUE")
        values[key] = value
    return values


def fill(params: type[T], values: Mapping[str, Any], owner: str) -> T:
    """Create an object of the dataclass ``params`` from ``values``.

    Values may be strings, numbers, booleans or None, as they come from the command line, YAML or
    Python. Raises QplugError, whose message begins with ``owner`` ("algorithm awq"), for an unknown
    key, a missing key, or a wrong value.
    """
    known = options(params)
    by_name = by_all_names(known)
    filled: dict[str, Any] = {}
    for key, value in values.items():
        option = by_name.get(_plain(str(key)))
        if option is None:
            names = ", ".join(o.name for o in known) or "none"
            hint = did_you_mean(str(key), by_name)
            raise QplugError(f"{owner} has no option {key!r}.{hint} It has: {names}")
        if option.name in filled:
            raise QplugError(f"{owner}: option {option.name!r} is given twice")
        filled[option.name] = convert(option, value, f"{owner}: {key}={value}")
    for option in known:
        if option.required and option.name not in filled:
            raise QplugError(f"{owner} needs the option {option.name}: {option.param.help}")
    try:
        return params(**filled)
    except QplugError as error:
        raise QplugError(f"{owner}: {error}") from None


def by_all_names(known: typing.Iterable[Option]) -> dict[str, Option]:
    """Options by all their names, older names included, with underscores instead of hyphens."""
    return {_plain(name): o for o in known for name in (o.name, *o.param.also)}


def _plain(name: str) -> str:
    return name.replace("-", "_")


def convert(option: Option, value: Any, where: str) -> Any:
    """Convert ``value`` into the type of ``option``.

    Raises QplugError, whose message begins with ``where``, for a wrong value.
    """
    if option.optional and (value is None or str(value).lower() in ("none", "null")):
        return None
    if option.choices:
        for choice in option.choices:
            if str(choice) == str(value):
                return choice
        names = ", ".join(str(choice) for choice in option.choices)
        none = " or none" if option.optional else ""
        hint = did_you_mean(str(value), map(str, option.choices))
        raise QplugError(f"{where}: must be one of {names}{none}{hint and '.' + hint}")
    try:
        converted = _scalar(option.kind, value)
    except (ValueError, TypeError):
        raise QplugError(f"{where}: must be {option.type_name}") from None
    low, high = option.param.min, option.param.max
    if (low is not None and converted < low) or (high is not None and converted > high):
        raise QplugError(f"{where}: must be {option.type_name}")
    return converted


def _scalar(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in _WORDS:
            return _WORDS[str(value).lower()]
        raise ValueError
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Path)):
        raise ValueError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    converted = kind(value)
    if isinstance(converted, float) and math.isnan(converted):
        raise ValueError
    return converted
