"""A hook of mkdocs: tables of the site know what phones need to show each row as a card.

``docs/stylesheets/fit.css`` shows them. Each cell gets the name of its column as ``data-label``,
and elements get the roles that they lose where CSS makes blocks of them. Long names get places to
break.
"""

from __future__ import annotations

import html
import re
from typing import Any

_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_HEAD = re.compile(r"<th[^>]*>(.*?)</th>", re.DOTALL)
_ROW = re.compile(r"<tr>.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<td([^>]*)>(.*?)</td>", re.DOTALL)
#: Words between tags, or the tags.
_WORD = re.compile(r"<[^>]*>|&\w+;|[\w./=+-]+")
#: Columns from which on a table is ``many``, and the letters of words that may break in any table
#: and in such a table.
_MANY, _LONG, _SHORTER = 9, 16, 8
_ROLES = (("table", "table"), ("thead", "rowgroup"), ("tbody", "rowgroup"), ("tr", "row"))


def on_page_content(content: str, **_: Any) -> str:
    """Returns the HTML of a page with its tables changed."""
    return _TABLE.sub(lambda table: _fitting(table[0]), content)


def _fitting(table: str) -> str:
    heads = _HEAD.findall(table)
    labels = [re.sub(r"<[^>]*>", "", head) for head in heads]
    longest = _SHORTER if len(heads) > _MANY else _LONG
    table = _HEAD.sub(lambda head: head[0].replace(head[1], _broken(head[1], longest)), table)
    table = _ROW.sub(lambda row: _labelled(row[0], labels, longest), table)
    for tag, role in _ROLES:
        table = table.replace(f"<{tag}>", f'<{tag} role="{role}">')
    if len(heads) >= _MANY:
        table = table.replace("<table", '<table data-many=""', 1)
    return re.sub(r"<th(?=[ >])", '<th role="columnheader" scope="col"', table)


def _labelled(row: str, labels: list[str], longest: int) -> str:
    cells = iter(labels)

    def labelled(cell: re.Match[str]) -> str:
        label = html.escape(html.unescape(next(cells, "")), quote=True)
        content = _broken(cell[2], longest)
        return f'<td role="cell" data-label="{label}"{cell[1]}>{content}</td>'

    return _CELL.sub(labelled, row)


def _broken(content: str, longest: int) -> str:
    """Returns HTML with places to break in words of ``longest`` letters and more."""
    return _WORD.sub(
        lambda word: (
            word[0] if len(word[0]) < longest or word[0][0] in "<&" else _breaking(word[0])
        ),
        content,
    )


def _breaking(word: str) -> str:
    """Returns ``word`` with places to break: after a sign, and before a capital in the middle."""
    return re.sub(r"(?<=[._/=+-])(?=\w)|(?<=[a-z0-9])(?=[A-Z])", "<wbr>", word)
