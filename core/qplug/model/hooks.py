"""Hooks of modules that are taken off when a piece of work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks behind ``handles`` at the end of the ``with`` block."""
    registered = [*handles]
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()
