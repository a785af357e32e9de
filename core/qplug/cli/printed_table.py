"""Tables on stdout, for people to read and for programs to cut into columns."""

from __future__ import annotations

from collections.abc import Sequence

import click


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints ``rows``, a line each, in columns as wide as their widest cell.

    No cell is cut or wrapped, whatever the width of the terminal: a name can always be copied.
    A letter that a terminal draws in two places counts as two.
    """
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell + " " * (w - cell_len(cell)) for cell, w in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
