"""Frozen dataclasses as the schema of a file: read from YAML, written to it, told as JSON Schema.

A field is ``name: Annotated[type, Doc("what it means")] = default``. Types: ``str``, ``int``,
``float``, ``bool``, ``Path``, ``Literal[...]``, another such dataclass, ``tuple[T, ...]``,
``Mapping[str, T]``, and unions of them. A union is read as the first member that fits the shape:
a mapping as a dataclass, a list as a tuple, a scalar as what it is.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from qplug.errors import did_you_mean
from qplug.recipe.yaml_tree import Node

T = TypeVar("T")


@dataclass(frozen=True)
class Doc:
    """What a field means."""

    text: str


@dataclass(frozen=True)
class Slot:
    """One field, taken apart."""

    name: str
    kind: Any
    doc: str
    default: Any

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


def slots(kind: type) -> Iterator[Slot]:
    """The fields of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, doc = get_args(hints[field.name])
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Slot(field.name, hint, doc.text, default)


# --- reading --------------------------------------------------------------------------------------


def read(kind: type[T], node: Node) -> T:
    """The dataclass ``kind`` that ``node`` spells.

    Raises QplugError, with the line, for an unknown key, a missing one, or a wrong value.
    """
    entries = node.entries()
    known = {slot.name: slot for slot in slots(kind)}
    values = {}
    for key, inner in entries.items():
        if key not in known:
            raise inner.place.error(f"no such key.{did_you_mean(key, known)}", known)
        values[key] = _value(known[key].kind, inner)
    for slot in known.values():
        if slot.required and slot.name not in values:
            raise node.place.error(f"has no {slot.name!r}, which it needs: {slot.doc}")
    return kind(**values)


def _value(kind: Any, node: Node) -> Any:
    if get_origin(kind) is not None:
        return _GENERIC[get_origin(kind)](get_args(kind), node)
    if dataclasses.is_dataclass(kind):
        return read(typing.cast("type[Any]", kind), node)
    return _SCALARS[kind](node)


def _union(members: tuple[Any, ...], node: Node) -> Any:
    return _value(_member(members, node), node)


def _list(members: tuple[Any, ...], node: Node) -> tuple[Any, ...]:
    if not isinstance(node.value, tuple):
        raise node.place.error(f"{node.plain()!r} is wrong", "a list")
    return tuple(_value(members[0], item) for item in node.value)


def _mapping(members: tuple[Any, ...], node: Node) -> dict[str, Any]:
    return {key: _value(members[1], item) for key, item in node.entries().items()}


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

    found = next((kind for kind in members if fits(kind)), None)
    if found is None:
        raise node.place.error(f"{node.plain()!r} is wrong", " or ".join(map(_told, members)))
    return found


_EXACT: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    Path: (str,),
}
_SCALARS: dict[Any, Any] = {
    str: Node.word,
    int: Node.whole,
    float: Node.number,
    bool: Node.switch,
    Path: lambda node: Path(node.word()),
}


_GENERIC: dict[Any, Any] = {
    Union: _union,
    types.UnionType: _union,
    Literal: lambda choices, node: node.word(choices),
    tuple: _list,
    Mapping: _mapping,
}


def _told(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return f"a mapping of {', '.join(slot.name for slot in slots(typing.cast('type', kind)))}"
    names = {str: "a string", int: "a whole number", float: "a number", bool: "True or False"}
    return names.get(kind, "none" if kind is type(None) else str(kind))


# --- writing --------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Plain values for YAML or JSON; fields that have their default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            slot.name: plain(getattr(value, slot.name))
            for slot in slots(type(value))
            if slot.required or getattr(value, slot.name) != slot.default
        }
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


# --- JSON Schema ----------------------------------------------------------------------------------


def json_schema(kind: type, title: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of files that ``read`` takes."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **_object(kind),
    }


def _object(kind: type) -> dict[str, Any]:
    fields = list(slots(kind))
    properties = {}
    for slot in fields:
        properties[slot.name] = {**_schema(slot.kind), "description": slot.doc}
        if not slot.required and slot.default is not None:
            properties[slot.name]["default"] = plain(slot.default)
    return {
        "type": "object",
        "properties": properties,
        "required": [slot.name for slot in fields if slot.required],
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
        return _object(typing.cast("type", kind))
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
