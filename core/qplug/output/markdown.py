"""Writes strangers' names into Markdown, where they stay names."""

from __future__ import annotations

import re

from qplug.errors import shown

#: Names that mean nothing but themselves, in Markdown.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9]*([._-][A-Za-z0-9]+)*")


def code_span(text: str) -> str:
    """Returns ``text`` as a code span, which no backtick, tag or line break of ``text`` ends."""
    text = shown(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def heading(text: str) -> str:
    """Returns ``text`` for a heading: as it is, or as a code span if it could mean more."""
    return text if _PLAIN.fullmatch(text) else code_span(text)
