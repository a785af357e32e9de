"""The results of the zoo: a file of JSON with a line for each tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: The file that is committed, and that docs/models.md is written from.
COMMITTED = Path(__file__).parents[2] / "docs" / "models.json"

Results = dict[str, dict[str, Any]]


def read_results(file: Path) -> Results:
    """Returns the results in ``file``, by name of the model; none if there is no file."""
    if not file.exists():
        return {}
    found: Results = json.loads(file.read_text("utf-8"))
    return found


def write_results(file: Path, results: Results) -> None:
    """Writes ``results`` into ``file``, sorted by name."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(found, sort_keys=True)}"
        for name, found in sorted(results.items())
    ]
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    fresh.replace(file)
