"""Values of JSON as the types that they must have; a wrong one is named with its place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qplug.errors import QplugError


@dataclass(frozen=True)
class Typed:
    """A ``value`` of JSON, at ``where``: the file, and the keys that lead to the value.

    Each method returns the value as one type, and raises QplugError for another type.
    """

    where: str
    value: Any

    def get(self, key: str) -> Typed | None:
        """The value of ``key`` of a mapping; None if the mapping lacks it, or if it is null."""
        inner = self.mapping().get(key)
        return None if inner is None or inner.value is None else inner

    def need(self, key: str) -> Typed:
        """The value of ``key`` of a mapping; raises QplugError too if the mapping lacks it."""
        inner = self.mapping().get(key)
        if inner is None:
            raise QplugError(f"{self.where}: lacks {key!r}")
        return inner

    def mapping(self) -> dict[str, Typed]:
        """A mapping, by key."""
        if not isinstance(self.value, dict):
            raise self._wrong("a mapping")
        return {key: Typed(f"{self.where}: {key[:200]}", v) for key, v in self.value.items()}

    def items(self) -> Iterator[Typed]:
        """The members of a list."""
        if not isinstance(self.value, (list, tuple)):
            raise self._wrong("a list")
        return (Typed(f"{self.where}[{n}]", inner) for n, inner in enumerate(self.value))

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            raise self._wrong("a string")
        return self.value

    def texts(self) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(item.text() for item in self.items())

    def whole(self, least: int, most: int) -> int:
        """A whole number from ``least`` to ``most``."""
        if type(self.value) is not int or not least <= self.value <= most:
            raise self._wrong(f"a whole number from {least} to {most}")
        return self.value

    def number(self) -> float:
        """A finite number."""
        if type(self.value) not in (int, float) or not math.isfinite(self.value):
            raise self._wrong("a number")
        return float(self.value)

    def switch(self) -> bool:
        """true or false."""
        if not isinstance(self.value, bool):
            raise self._wrong("true or false")
        return self.value

    def _wrong(self, wanted: str) -> QplugError:
        shown = ascii(self.value)
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        return QplugError(f"{self.where}: must be {wanted}, not {shown}")
