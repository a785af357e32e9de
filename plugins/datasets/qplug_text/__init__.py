"""Your own text or chats: a txt, md, jsonl or json file, or a folder of such files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qplug import Dataset, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def qplug_datasets() -> Iterable[type[Dataset[Any]]]:
    from qplug_text.text_files import TextFiles

    return [TextFiles]
