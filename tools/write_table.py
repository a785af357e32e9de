"""Put the results of the engine tests into docs/engines.md, between its markers.

    python tools/write_table.py

Results are the JSON files in docs/engine_results, as the tests write them where
QPLUG_ENGINE_RESULTS names a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "engines.md"
BEGIN, END = "<!-- begin: engine results -->", "<!-- end: engine results -->"

_COLUMNS = ("case", "difference", "rounding", "perplexity", "qplug eval", "emulated", "note")


def table(told: dict[str, Any]) -> str:
    """One run's results in Markdown: what computed, the rows, and what was left out and why."""
    versions = ", ".join(told["versions"].values())
    device = f"CPU ({told['machine']})" if told["device"] == "cpu" else told["device"]
    text = f"{told.get('windows', 8)} windows of 128 tokens"
    lines = [f"### {device}, {told['date']}", ""]
    lines += [f"qplug {told['qplug']}, {versions}; {text}.", ""]
    lines += [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    for row in told["rows"]:
        cells = (str(row.get(column, "")) for column in _COLUMNS)
        lines.append(f"| {' | '.join(cells)} |")
    for case, why in told.get("failed", {}).items():
        lines += ["", f"Failed: `{case}`: {why}"]
    if told["left out"]:
        lines += ["", "Left out:", ""]
        lines += [f"- `{case}`: {why}" for case, why in told["left out"].items()]
    return "\n".join(lines)


def section() -> str:
    """All that stands between the markers."""
    files = sorted((DOCS / "engine_results").glob("*.json"))
    tables = [table(json.loads(path.read_text("utf-8"))) for path in files]
    return "\n\n".join([BEGIN, *tables, END])


def page(before: str) -> str:
    """The page with this section in the place of what stood there."""
    head, _, rest = before.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + section() + tail


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
