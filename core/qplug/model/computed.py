"""Attributes of one module that are computed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def compute_attribute(module: nn.Module, name: str, compute: Callable[[], object]) -> None:
    """Makes ``name`` an attribute of ``module`` alone that is what ``compute`` returns.

    The class of the module goes by its old name.
    """
    kind = type(module)
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(kind.__name__, (kind,), {**named, name: property(lambda _: compute())})
