"""Text that comes with every Python, so that a first run needs no network and no files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qplug import Dataset, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def qplug_datasets() -> Iterable[type[Dataset[Any]]]:
    from qplug_demo.python_text import Demo

    return [Demo]
