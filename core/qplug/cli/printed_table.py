"""Prints tables on stdout, for people to read and for programs to split into columns."""

from __future__ import annotations

from collections.abc import Sequence

from qplug.cli.printing import say
from qplug.errors import shown


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints a line for each of ``rows``, in columns as wide as their widest cell.

    No cell is shortened or wrapped to fit the terminal, so that a name can always be copied. A
    character that a terminal draws at double width counts as two.
    """
    from rich.cells import cell_len

    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell + " " * (w - cell_len(cell)) for cell, w in zip(row, widths, strict=True))
        say("  ".join(cells).rstrip())
