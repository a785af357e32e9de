"""HTML and SVG made of nested calls. Whatever is not ``Markup`` is text, and escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias, Union

_VOID = frozenset({"meta", "line", "rect", "circle", "path"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child: TypeAlias = Union[str, "Iterable[Child]"]


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """``<name attributes>children</name>``.

    Underscores in the names of attributes are hyphens, one at the end is dropped (``class_``);
    those that are None are left out.
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = join(children)
    if name in _VOID and not inner:
        return Markup(f"<{name}{told}>" if name == "meta" else f"<{name}{told}/>")
    return Markup(f"<{name}{told}>{inner}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after the other."""
    return Markup("".join(map(_rendered, children)))


def _rendered(child: Child) -> str:
    if isinstance(child, Markup):
        return str(child)
    return escape(child) if isinstance(child, str) else join(child)


def _plain(value: str | float) -> str:
    """Coordinates to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def table(head: Iterable[str], rows: Iterable[Iterable[Child]], caption: str = "") -> Markup:
    """A table whose first column names its rows."""
    body = []
    for row in rows:
        first, *others = row
        body.append(tag("tr", tag("th", first, scope="row"), [tag("td", c) for c in others]))
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else "",
            tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])),
            tag("tbody", body),
        ),
        class_="scroll",
        tabindex="0",
    )
