"""The public functions for datasets: windows of tokens, and text from the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qplug.files.json_text import parse_json
from qplug.files.text_file import read_text_file
from qplug.text.hub import HubParams, HubText

if TYPE_CHECKING:
    from qplug.text.windows import (
        document_windows,
        first_windows,
        packed_windows,
        random_windows,
        sample,
    )

__all__ = [
    "HubParams",
    "HubText",
    "document_windows",
    "first_windows",
    "packed_windows",
    "parse_json",
    "random_windows",
    "read_text_file",
    "sample",
]


if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        """Functions on windows, imported when first asked for: listing datasets needs no torch."""
        if name in __all__:
            from qplug.text import windows

            return getattr(windows, name)
        raise AttributeError(f"module 'qplug.text' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
