"""Reads a YAML file into values that know their lines; tags never run code."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from qplug.errors import QplugError, did_you_mean
from qplug.files.regular import read_text

Scalar: TypeAlias = "str | int | float | bool | None"
_Pair: TypeAlias = "tuple[yaml.ScalarNode, yaml.Node]"

#: The longest file, in bytes; the most values in it, with aliases written out; the most lists and
#: mappings around a value; the most digits of a number. Recipes have a hundredth of each.
MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_NUMBER = 1 << 18, 20_000, 50, 64

#: Characters of a file that a message quotes.
_LONGEST = 300

_MERGE = "tag:yaml.org,2002:merge"
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
#: Numbers to the base of 8 and 60, which YAML 1.1 writes like text and times: ``010``, ``12:30``.
_MISREAD = re.compile(r"[-+]?0[0-7_]+$|.*:")


@dataclass(frozen=True)
class Place:
    """The place of a value in a file, such as ``recipe.yml:12: quant.weight.bit``."""

    file: str
    line: int
    path: str

    def __str__(self) -> str:
        path = f": {_brief(self.path)}" if self.path else ""
        return f"{self.file}:{self.line}{path}"

    def error(self, what: str, allowed: Iterable[object] | str = ()) -> QplugError:
        """The QplugError to raise: it names this place, the mistake, and the allowed values."""
        names = allowed if isinstance(allowed, str) else ", ".join(map(str, allowed))
        return QplugError(f"{self}: {_brief(what)}" + (f"; allowed: {names}" if names else ""))


def _brief(text: str) -> str:
    """``text``, which quotes a file, of a limited length."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


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
        fits = type(value) is int and abs(value) < 1 << 63
        if not fits or (least is not None and int(value or 0) < least):
            bound = "" if least is None else f" of {least} or more"
            raise self.place.error(f"{value!r} is wrong", f"a whole number{bound}")
        assert isinstance(value, int)
        return value

    def number(self) -> float:
        """The value as a float."""
        value = self.scalar()
        try:  # YAML 1.1 reads 1e-4, without a point, as a string
            if isinstance(value, bool) or value is None or not math.isfinite(float(value)):
                raise ValueError
            return float(value)
        except (ValueError, OverflowError):
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

    Raises QplugError if the file cannot be read, is longer than ``MAX_BYTES``, or as ``parse_yaml``
    does.
    """
    try:
        text = read_text(path, MAX_BYTES)
    except FileNotFoundError:
        raise QplugError(f"{path}: no such file") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str) -> Node:
    """Returns the document in ``text``, which is of the file ``path``.

    Raises QplugError if the text is empty, is not YAML, repeats a key, has a tag, or has more than
    ``MAX_NODES`` values or ``MAX_DEPTH`` lists and mappings around one, where each alias counts as
    what it stands for.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise QplugError(f"{path}: is empty")
        return _Composed(path, loader).node(root, "")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise QplugError(f"{path}:{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise QplugError(f"{path}: not YAML: {error}") from error
    except RecursionError:
        raise QplugError(f"{path}: its values are nested more than {MAX_DEPTH} deep") from None


class _Composed:
    """Turns the nodes of PyYAML into nodes with places."""

    def __init__(self, file: str, loader: yaml.SafeLoader) -> None:
        self._file, self._loader = file, loader
        self._above: list[int] = []
        self._count = 0
        self._merged: dict[int, dict[str, _Pair]] = {}

    def node(self, node: yaml.Node, path: str) -> Node:
        place = self._place(node, path)
        self._count += 1
        if self._count > MAX_NODES:
            raise place.error(f"the file has more than {MAX_NODES} values; use fewer aliases")
        with self._inside(node, place):
            return Node(place, self._value(node, place))

    def _place(self, node: yaml.Node, path: str) -> Place:
        return Place(self._file, node.start_mark.line + 1, path)

    @contextmanager
    def _inside(self, node: yaml.Node, place: Place) -> Iterator[None]:
        """A context that refuses a node within itself, and one too deep in others."""
        if id(node) in self._above:
            raise place.error("contains itself")
        if len(self._above) > MAX_DEPTH:
            raise place.error(f"is nested more than {MAX_DEPTH} deep")
        self._above.append(id(node))
        try:
            yield
        finally:
            self._above.pop()

    def _value(self, node: yaml.Node, place: Place) -> Any:
        if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTIONS:
            raise place.error(f"has the tag {node.tag!r}; remove it")
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.node(n, f"{place.path}[{i}]") for i, n in enumerate(node.value))
        if isinstance(node, yaml.MappingNode):
            return self._entries(node, place)
        if len(node.value) > MAX_NUMBER and node.tag in _NUMBERS:
            raise place.error(f"is a number of more than {MAX_NUMBER} digits")
        if node.tag in _NUMBERS and _MISREAD.match(node.value):
            raise place.error(
                f"{node.value} is another number in YAML; write it without zeros before it and "
                "without colons, or in quotes"
            )
        try:
            value = self._loader.construct_object(node)
        except (ValueError, KeyError, AttributeError) as error:  # the 31st of February; !!bool x
            raise place.error(f"{node.value[:40]!r} is wrong") from error
        plain = value is None or isinstance(value, (str, int, float))
        return value if plain else node.value  # a date stays the text in the file

    def _entries(self, node: yaml.MappingNode, place: Place) -> dict[str, Node]:
        pairs = self._pairs(node, place)
        own = Counter(key.value for key, _ in node.value if key.tag != _MERGE)
        entries: dict[str, Node] = {}
        for name, (key, value) in pairs.items():
            inner = self.node(value, f"{place.path}.{name}" if place.path else name)
            # The line of the key, since the value of an alias has the line of its anchor.
            at = self._place(key, inner.place.path)
            if own[name] > 1:
                raise at.error("is repeated; remove one")
            entries[name] = Node(at, inner.value)
        return entries

    def _pairs(self, node: yaml.MappingNode, place: Place) -> dict[str, _Pair]:
        """The keys and values of a mapping, and of the mappings merged into it, by key.

        A key of the mapping wins over a merged one, and a mapping over one merged after it.
        """
        known = self._merged.get(id(node))
        if known is not None:
            return known
        own: dict[str, _Pair] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._place(key, place.path).error("a key must be a word")
            if key.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                own[key.value] = (key, value)
        pairs: dict[str, _Pair] = {}
        for other in reversed(merged):
            if not isinstance(other, yaml.MappingNode):
                raise self._place(other, place.path).error("only mappings can be merged by <<")
            if other is node:
                raise place.error("contains itself")
            with self._inside(other, place):
                pairs |= self._pairs(other, place)
        pairs |= own
        self._merged[id(node)] = pairs
        return pairs
