"""The base of all that plugins offer: a named class with typed options."""

from __future__ import annotations

import inspect
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

P = TypeVar("P")


@dataclass(frozen=True)
class NoParams:
    """Options of a component that has none."""


class Component(ABC, Generic[P]):
    """The base class of algorithms, datasets and exporters.

    ``name`` is what users type: lower case, hyphens. The first line of the class's docstring is
    its one-line description. ``Params`` is a frozen dataclass whose fields are annotated with
    ``Param``; options reach a component only through it, from command line, YAML and Python alike.
    """

    name: ClassVar[str]
    Params: ClassVar[type] = NoParams

    def __init__(self, params: P) -> None:
        self.params = params

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]
