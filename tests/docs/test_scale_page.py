"""docs/scale.md has the estimates as they are now, and these are near what was measured."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "tools/scale_page.py"))
RUNS = SCRIPT["data"]()["runs"]


def test_the_page_has_the_tables() -> None:
    """If not: ``python tools/scale_page.py``."""
    page = SCRIPT["PAGE"].read_text(encoding="utf-8")
    assert SCRIPT["written"](page) == page


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['model']} {run['algo']}")
def test_estimates_are_within_a_fifth_of_what_was_measured(run: dict[str, Any]) -> None:
    compared = SCRIPT["comparisons"](run)
    assert compared
    for what, measured, estimated, _ in compared:
        assert 0.8 <= estimated / measured <= 1.2, what
