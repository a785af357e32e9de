"""Tables of a page: plain data that ``templates/parts.html.jinja`` renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and the number by which the script of the page sorts it, if it has one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table: its caption, the names of its columns, and rows; a row's first cell is its name.

    The script of the page can sort a table that is ``sortable`` by any column.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    sortable: bool = False

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, with text as cells."""
        return [
            [cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows
        ]
