"""WikiText-2: Wikipedia articles, the usual text to compare perplexities on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qplug import Dataset, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def qplug_datasets() -> Iterable[type[Dataset[Any]]]:
    from qplug_wikitext.wikitext2 import WikiText2

    return [WikiText2]
