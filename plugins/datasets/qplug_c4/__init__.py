"""C4: cleaned web pages, the calibration text of many papers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qplug import Dataset, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def qplug_datasets() -> Iterable[type[Dataset[Any]]]:
    from qplug_c4.crawl import C4

    return [C4]
