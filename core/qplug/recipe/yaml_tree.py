"""Reads a YAML file into values that know their lines; tags never run code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from qplug.errors import QplugError, did_you_mean

Scalar: TypeAlias = "str | int | float | bool | None"


@dataclass(frozen=True)
class Place:
    """The place of a value in a file, such as ``recipe.yml:12: quant.weight.bit``."""

    file: str
    line: int
    path: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.path}" if self.path else f"{self.file}:{self.line}"

    def error(self, what: str, allowed: Iterable[object] | str = ()) -> QplugError:
        """The QplugError to raise: it names this place, the mistake, and the allowed values."""
        names = allowed if isinstance(allowed, str) else ", ".join(map(str, allowed))
        return QplugError(f"{self}: {what}" + (f"; allowed: {names}" if names else ""))


@dataclass(frozen=True)
class Node:
    """A scalar, a list or a mapping, with its place in the file.

    The methods return the value as one type; they raise QplugError, with the place, for others.
    """

    place: Place
    value: Scalar | tuple[Node, ...] | dict[str, Node]

    def scalar(self) -> Scalar:
        """The value, which must be neither a list nor a mapping."""
        if isinstance(self.value, (tuple, dict)):
            kind = "a list" if isinstance(self.value, tuple) else "a mapping"
            raise self.place.error(f"is {kind}, but must be a single value")
        return self.value

    def word(self, allowed: Iterable[str] = ()) -> str:
        """The value as a string, which must be one of ``allowed`` if any are given."""
        value, allowed = self.scalar(), list(allowed)
        if not isinstance(value, str) or (allowed and value not in allowed):
            hint = did_you_mean(str(value), allowed)
            raise self.place.error(
                f"{value!r} is wrong{hint and '.' + hint[:-1]}", allowed or "a string"
            )
        return value

    def whole(self, least: int | None = None) -> int:
        """The value as an integer, which must be at least ``least``."""
        value = self.scalar()
        fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits or (least is not None and int(value or 0) < least):
            bound = "" if least is None else f" of {least} or more"
            raise self.place.error(f"{value!r} is wrong", f"a whole number{bound}")
        assert isinstance(value, int)
        return value

    def number(self) -> float:
        """The value as a float."""
        value = self.scalar()
        try:  # YAML 1.1 reads 1e-4, without a point, as a string
            if isinstance(value, bool) or value is None:
                raise ValueError
            return float(value)
        except ValueError:
            raise self.place.error(f"{value!r} is wrong", "a number") from None

    def switch(self) -> bool:
        """The value as a boolean."""
        value = self.scalar()
        if not isinstance(value, bool):
            raise self.place.error(f"{value!r} is wrong", "True, False")
        return value

    def items(self) -> tuple[Node, ...]:
        """The members of a list; a scalar counts as a list with one member."""
        if isinstance(self.value, dict):
            raise self.place.error("is a mapping, but must be a list")
        return self.value if isinstance(self.value, tuple) else (self,)

    def entries(self) -> dict[str, Node]:
        """The entries of a mapping."""
        if not isinstance(self.value, dict):
            raise self.place.error(f"{self.plain()!r} is wrong", "a mapping")
        return self.value

    def plain(self) -> Any:
        """The value as plain Python values, without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value


class Section:
    """A mapping that is read key by key; ``warn_of_rest`` warns about keys that nobody read.

    All sections of a file share ``warnings``. A key without a value counts as missing.
    """

    def __init__(self, node: Node, warnings: list[str]) -> None:
        self.place, self._entries, self.warnings = node.place, node.entries(), warnings
        self._known: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._entries and self._entries[key].value is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def get(self, *keys: str) -> Node | None:
        """The value of the first of ``keys`` that the mapping has, else None."""
        self._known.update(keys)
        return next((self._entries[key] for key in keys if key in self), None)

    def need(self, *keys: str) -> Node:
        """Like ``get``, but raises QplugError if the mapping has none of ``keys``."""
        node = self.get(*keys)
        if node is None:
            raise self.place.error(f"the required key {keys[0]!r} is missing")
        return node

    def section(self, *keys: str) -> Section | None:
        """The value of the first of ``keys`` as a section, else None."""
        node = self.get(*keys)
        return None if node is None else Section(node, self.warnings)

    def word(self, key: str, allowed: Iterable[str] = ()) -> str | None:
        """The value of ``key`` as a string, one of ``allowed`` if any are given, else None."""
        node = self.get(key)
        return None if node is None else node.word(allowed)

    def whole(self, key: str, least: int | None = None) -> int | None:
        """The value of ``key`` as an integer of at least ``least``, else None."""
        node = self.get(key)
        return None if node is None else node.whole(least)

    def switch(self, key: str, default: bool = False) -> bool:
        """The value of ``key`` as a boolean, else ``default``."""
        node = self.get(key)
        return default if node is None else node.switch()

    def leave(self, *keys: str) -> None:
        """Ignore ``keys`` without a warning."""
        self._known.update(keys)

    def warn(self, key: str, what: str) -> None:
        """Add the warning ``what`` about ``key``, which must exist."""
        self._known.add(key)
        self.warnings.append(f"{self._entries[key].place}: {what}")

    def warn_of_rest(self) -> None:
        """Add a warning for each key that no method has read."""
        for key, node in self._entries.items():
            if key not in self._known:
                hint = did_you_mean(key, self._known)
                self.warnings.append(f"{node.place}: unknown key, ignored.{hint}")


def read_yaml(path: Path) -> Node:
    """Read the document in ``path``.

    Raises QplugError if the file cannot be read, is empty, is not YAML, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise QplugError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise QplugError(f"{path}: cannot be read: {error}") from error
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise QplugError(f"{path}: is empty")
        return _Composed(str(path), loader).node(root, "")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise QplugError(f"{path}:{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise QplugError(f"{path}: not YAML: {error}") from error


class _Composed:
    """Turns the nodes of PyYAML into nodes with places."""

    def __init__(self, file: str, loader: yaml.SafeLoader) -> None:
        self._file, self._loader = file, loader
        self._above: list[int] = []

    def node(self, node: yaml.Node, path: str) -> Node:
        place = Place(self._file, node.start_mark.line + 1, path)
        if id(node) in self._above:
            raise place.error("contains itself")
        self._above.append(id(node))
        try:
            return Node(place, self._value(node, place))
        finally:
            self._above.pop()

    def _value(self, node: yaml.Node, place: Place) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.node(n, f"{place.path}[{i}]") for i, n in enumerate(node.value))
        if isinstance(node, yaml.MappingNode):
            return self._entries(node, place)
        value = self._loader.construct_object(node)
        plain = value is None or isinstance(value, (str, int, float))
        return value if plain else node.value  # a date stays the text in the file

    def _entries(self, node: yaml.MappingNode, place: Place) -> dict[str, Node]:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        self._loader.flatten_mapping(node)
        entries: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise Place(self._file, key.start_mark.line + 1, place.path).error(
                    "a key must be a word"
                )
            name = str(key.value)
            inner = self.node(value, f"{place.path}.{name}" if place.path else name)
            if name in entries and own.count(name) > 1:
                line = key.start_mark.line + 1
                raise Place(self._file, line, inner.place.path).error("is repeated; remove one")
            # The line of the key, since the value of an alias has the line of its anchor.
            line = key.start_mark.line + 1
            entries[name] = Node(Place(self._file, line, inner.place.path), inner.value)
        return entries
