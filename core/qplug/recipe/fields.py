"""Reads and writes recipes in files and in ``qplug.json``, and describes them as JSON Schema.

The schema is the dataclass itself: fields ``name: Annotated[type, Param("what it means")]``. Types:
``str``, ``int``, ``float``, ``bool``, ``Path``, ``Literal[...]``, another such dataclass,
``tuple[T, ...]``, ``Mapping[str, T]``, and unions of them. A union is read as the first member that
fits the shape: a mapping as a dataclass, a list as a tuple, a scalar by its type. A field of any
other type needs a ``Spelling``.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from qplug.api.params import Field, fields_of
from qplug.errors import QplugError, did_you_mean
from qplug.recipe.yaml_tree import Node

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a file, and the field that it fills.

    ``kind`` is the type of the value in files. ``default`` is a plain value as in files, or
    ``dataclasses.MISSING``.
    """

    name: str
    field: Field
    kind: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether a file must have the key."""
        return self.default is dataclasses.MISSING


def keys(kind: type) -> Iterator[Key]:
    """Yield the keys of a file that contains the dataclass ``kind``, in the order of its fields."""
    for field in fields_of(kind):
        if field.param.inline:
            yield from keys(field.type)
        elif field.param.key is not None:
            yield key_of(kind, field)


def key_of(kind: type, field: Field) -> Key:
    """The key that fills ``field`` of the dataclass ``kind``."""
    spelling, name = field.param.spelling, field.param.key or field.name
    if spelling is None:
        default = field.default if field.required else plain(field.default)
        return Key(name, field, field.type, default)
    default = field.default if field.required else plain(spelling.write(kind()))
    return Key(name, field, spelling.kind, default)


# --- reading --------------------------------------------------------------------------------------


def read(kind: type[T], node: Node) -> T:
    """Read an object of the dataclass ``kind`` from ``node``.

    Raises QplugError, with file and line, for an unknown key, a missing key, or a wrong value.
    """
    entries, known = node.entries(), {key.name: key for key in keys(kind)}
    for name, inner in entries.items():
        if name not in known:
            raise inner.place.error(f"unknown key.{did_you_mean(name, known)}", known)
    for key in known.values():
        if key.required and key.name not in entries:
            help_ = key.field.param.help
            raise node.place.error(f"the required key {key.name!r} is missing: {help_}")
    return _filled(kind, node, entries)


def _filled(kind: type[T], node: Node, entries: Mapping[str, Node]) -> T:
    values: dict[str, Any] = {}
    for field in fields_of(kind):
        inner = None if field.param.key is None else entries.get(field.param.key or field.name)
        if field.param.inline:
            values[field.name] = _filled(field.type, node, entries)
        elif inner is not None:
            values |= _field_values(field, inner)
    try:
        return kind(**values)
    except QplugError as error:
        raise node.place.error(str(error)) from error


def _field_values(field: Field, node: Node) -> Mapping[str, Any]:
    spelling = field.param.spelling
    value = _value(spelling.kind if spelling else field.type, node)
    if spelling is None:
        _check_bounds(field, value, node)
        return {field.name: value}
    try:
        return spelling.read(value)
    except QplugError as error:
        raise node.place.error(str(error)) from error


def _check_bounds(field: Field, value: Any, node: Node) -> None:
    least = field.param.min
    if least is not None and value is not None and value < least:
        raise node.place.error(f"{value!r} is wrong", f"a number of {least} or more")


def _value(kind: Any, node: Node) -> Any:
    if get_origin(kind) is not None:
        return _GENERIC[get_origin(kind)](get_args(kind), node)
    if dataclasses.is_dataclass(kind):
        return read(cast("type[Any]", kind), node)
    return _SCALARS[kind](node)


def _union(members: tuple[Any, ...], node: Node) -> Any:
    return _value(_member(members, node), node)


def _list(members: tuple[Any, ...], node: Node) -> tuple[Any, ...]:
    if not isinstance(node.value, tuple):
        raise node.place.error(f"{node.plain()!r} is wrong", "a list")
    return tuple(_value(members[0], item) for item in node.value)


def _mapping(members: tuple[Any, ...], node: Node) -> dict[str, Any]:
    return {key: _value(members[1], item) for key, item in node.entries().items()}


def _nothing(node: Node) -> None:
    if node.value is not None:
        raise node.place.error(f"{node.plain()!r} is wrong", "none")


def _member(members: tuple[Any, ...], node: Node) -> Any:
    def fits(kind: Any) -> bool:
        if kind is type(None):
            return node.value is None
        if isinstance(node.value, dict):
            return dataclasses.is_dataclass(kind) or get_origin(kind) is Mapping
        if isinstance(node.value, tuple):
            return get_origin(kind) is tuple
        if kind in _EXACT:
            return type(node.value) in _EXACT[kind]
        return node.value is not None and not dataclasses.is_dataclass(kind)

    member = next((kind for kind in members if fits(kind)), None)
    if member is None:
        raise node.place.error(f"{node.plain()!r} is wrong", " or ".join(map(_named, members)))
    return member


_EXACT: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    Path: (str,),
}
_SCALARS: dict[Any, Callable[[Node], Any]] = {
    str: Node.word,
    int: Node.whole,
    float: Node.number,
    bool: Node.switch,
    Path: lambda node: Path(node.word()),
    type(None): _nothing,
}


_GENERIC: dict[Any, Callable[[tuple[Any, ...], Node], Any]] = {
    Union: _union,
    types.UnionType: _union,
    Literal: lambda choices, node: node.word(choices),
    tuple: _list,
    Mapping: _mapping,
}


def _named(kind: Any) -> str:
    """A type in words, for messages."""
    if dataclasses.is_dataclass(kind):
        return f"a mapping of {', '.join(key.name for key in keys(cast('type', kind)))}"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    names = {str: "a string", int: "a whole number", float: "a number", bool: "True or False"}
    return names.get(kind, "none" if kind is type(None) else str(kind))


# --- writing --------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """``value`` as plain values for a file; keys with their default value are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dict(_entries(value))
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _entries(owner: Any) -> Iterator[tuple[str, Any]]:
    known = {key.field.name: key for key in keys(type(owner))}
    for field in fields_of(type(owner)):
        if field.param.inline:
            yield from _entries(getattr(owner, field.name))
        elif field.param.key is not None:
            spelling, key = field.param.spelling, known[field.name]
            value = plain(spelling.write(owner) if spelling else getattr(owner, field.name))
            if key.required or value != key.default:
                yield key.name, value


# --- qplug.json -----------------------------------------------------------------------------------


def to_dict(value: Any) -> Any:
    """``value`` as plain values for JSON, with every field; ``from_dict`` reads it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "to_dict", None)
        return own() if own else all_fields(value)
    if isinstance(value, Mapping):
        return {key: to_dict(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_dict(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def all_fields(value: Any) -> dict[str, Any]:
    """Every field of the dataclass object ``value`` as a plain value, by name."""
    return {field.name: to_dict(getattr(value, field.name)) for field in fields_of(type(value))}


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Create an object of the dataclass ``kind`` from the plain ``values`` of its fields.

    Missing fields get their default. Raises QplugError if ``values`` do not fit.
    """
    known = {field.name: field for field in fields_of(kind)}
    if not isinstance(values, Mapping):
        raise _unfit(values, kind)
    for name in values:
        if name not in known:
            raise QplugError(f"unknown field {ascii(name)[:40]}")
    fields = {name: _from_plain(known[name].type, value) for name, value in values.items()}
    try:
        return kind(**fields)
    except TypeError as error:  # a field without a default is missing
        raise QplugError(str(error)) from error


def _from_plain(kind: Any, value: Any) -> Any:
    origin = get_origin(kind)
    if origin is not None:
        return _GENERIC_PLAIN[origin](get_args(kind), value)
    own = getattr(kind, "from_dict", None)
    if own is not None and isinstance(value, Mapping):
        return own(value)
    if dataclasses.is_dataclass(kind):
        return from_dict(cast("type[Any]", kind), value)
    if type(value) not in _EXACT.get(kind, (kind,)):
        raise _unfit(value, kind)
    return value


def _plain_union(members: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in members:
        return None
    several = [member for member in members if member is not type(None)]
    exact = (member for member in several if type(value) in _EXACT.get(member, ()))
    member = several[0] if len(several) == 1 else next(exact, None)
    if member is None:
        raise _unfit(value, *members)
    return _from_plain(member, value)


def _plain_choice(members: tuple[Any, ...], value: Any) -> Any:
    if value not in members:
        raise _unfit(value, Literal[members])
    return value


def _plain_list(members: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise QplugError(f"{ascii(value)[:40]} is wrong; it must be a list")
    inner = members[:1] * len(value) if Ellipsis in members else members
    if len(inner) != len(value):
        raise QplugError(f"{ascii(value)[:40]} is wrong; it must be a list of {len(inner)}")
    return tuple(_from_plain(kind, item) for kind, item in zip(inner, value, strict=True))


def _plain_mapping(members: tuple[Any, ...], value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise QplugError(f"{ascii(value)[:40]} is wrong; it must be a mapping")
    return {key: _from_plain(members[1], item) for key, item in value.items()}


_GENERIC_PLAIN: dict[Any, Callable[[tuple[Any, ...], Any], Any]] = {
    Union: _plain_union,
    types.UnionType: _plain_union,
    Literal: _plain_choice,
    tuple: _plain_list,
    Mapping: _plain_mapping,
}


def _unfit(value: Any, *kinds: Any) -> QplugError:
    wanted = " or ".join(map(_named, kinds))
    return QplugError(f"{ascii(value)[:40]} is wrong; it must be {wanted}")


# --- JSON Schema ----------------------------------------------------------------------------------


def json_schema(kind: type, title: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of files that ``read`` reads as ``kind``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **_object(kind),
    }


def _object(kind: type) -> dict[str, Any]:
    known = list(keys(kind))
    properties = {}
    for key in known:
        properties[key.name] = {**_schema(key.kind), "description": key.field.param.help}
        if key.field.param.min is not None:
            properties[key.name]["minimum"] = key.field.param.min
        if not key.required and key.default is not None:
            properties[key.name]["default"] = key.default
    return {
        "type": "object",
        "properties": properties,
        "required": [key.name for key in known if key.required],
        "additionalProperties": False,
    }


_JSON = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    Path: "string",
    type(None): "null",
}


def _schema(kind: Any) -> dict[str, Any]:
    if get_origin(kind) is not None:
        return _GENERIC_SCHEMAS[get_origin(kind)](get_args(kind))
    if dataclasses.is_dataclass(kind):
        return _object(cast("type", kind))
    return {"type": _JSON[kind]}


def _union_schema(members: tuple[Any, ...]) -> dict[str, Any]:
    schemas = [_schema(member) for member in members]
    if all(set(schema) == {"type"} for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {"anyOf": schemas}


_GENERIC_SCHEMAS: dict[Any, Callable[[tuple[Any, ...]], dict[str, Any]]] = {
    Union: _union_schema,
    types.UnionType: _union_schema,
    Literal: lambda choices: {"enum": list(choices)},
    tuple: lambda members: {"type": "array", "items": _schema(members[0])},
    Mapping: lambda members: {"type": "object", "additionalProperties": _schema(members[1])},
}
