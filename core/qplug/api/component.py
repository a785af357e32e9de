"""What every plugin offers: a named thing with typed parameters."""

from __future__ import annotations

import inspect
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

P = TypeVar("P")


@dataclass(frozen=True)
class NoParams:
    """For components that have nothing to choose."""


class Component(ABC, Generic[P]):
    """A named thing with typed parameters: what every plugin offers.

    ``name`` is what users type: lower case, hyphens. The first line of the class's docstring is
    its one-line description. ``Params`` is a frozen dataclass whose fields are annotated with
    ``Param``; it is the only way in for options, from the command line, YAML and Python alike.
    """

    name: ClassVar[str]
    Params: ClassVar[type] = NoParams

    def __init__(self, params: P) -> None:
        self.params = params

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]
