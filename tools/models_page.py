"""Writes the table of docs/models.md from the table of weights that engines build float."""

from __future__ import annotations

from pathlib import Path

from qplug.model.kept_float import KEPT_FLOAT

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- begin: table -->", "<!-- end: table -->"


def table() -> str:
    """Returns the table in Markdown."""
    lines = ["| weights | models | engines | why | read in |", "|---|---|---|---|---|"]
    for row in KEPT_FLOAT:
        cells = (
            ", ".join(f"`{pattern}`" for pattern in row.patterns),
            ", ".join(row.models) or "all",
            ", ".join(row.why.engines) or "all",
            row.why.reason,
            row.why.source.replace("*", r"\*"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """Returns ``page`` with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
