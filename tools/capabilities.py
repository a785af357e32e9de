"""Write the tables of capabilities into docs/engines.md: ``python tools/capabilities.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qplug import PRESETS, Capability
from qplug.api.gpus import DEVICES
from qplug.registry.registry import Registry

PAGE = Path(__file__).parents[1] / "docs/engines.md"
BEGIN, END = "<!-- capabilities: written by tools/capabilities.py -->", "<!-- /capabilities -->"


def tables() -> str:
    """A table for each backend that has an engine, one row for a scheme and its engine."""
    registry = Registry.installed()
    parts = []
    for name in registry.exporters:
        engine = registry.exporters[name].engine
        rows = [] if engine is None else engine.capabilities()
        if rows:
            parts.append(f"### `{name}`\n\n{_table(rows)}")
    return "\n\n".join(parts)


def _table(rows: Sequence[Capability]) -> str:
    lines = [
        f"| scheme | engine | {' | '.join(DEVICES)} | groups | out, in % |",
        f"|---|---|{'---|' * len(DEVICES)}---|---|",
    ]
    reasons: list[str] = []
    seen = dict.fromkeys((row.scheme, row.engine) for row in rows)
    for scheme, engine in sorted(seen, key=lambda pair: list(PRESETS).index(pair[0])):
        alike = [row for row in rows if (row.scheme, row.engine) == (scheme, engine)]
        cells = [_cell([row for row in alike if gpu in row.devices], reasons) for gpu in DEVICES]
        served = [row for row in alike if row.served]
        sizes = ", ".join(map(str, served[0].group_sizes)) if served else ""
        limits = {f"{row.out_multiple}, {row.in_multiple}" for row in served}
        lines.append(
            f"| `{scheme}` | {engine} | {' | '.join(cells)} | {sizes} | {'; '.join(limits)} |"
        )
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return "\n".join(lines) + (f"\n\n{notes}" if notes else "")


def _cell(rows: Sequence[Capability], reasons: list[str]) -> str:
    if not rows:
        return ""
    (row,) = rows
    if row.served:
        return f"**{row.kernel}**" if row.evidence.startswith("run") else row.kernel
    if row.kernel not in reasons:
        reasons.append(row.kernel)
    return f"no ({reasons.index(row.kernel) + 1})"


def page(text: str) -> str:
    """``text`` with the tables as they are now between the two marks."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
