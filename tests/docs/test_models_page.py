"""The page on models shows the table of weights that engines build float."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table() -> None:
    """If not: ``python tools/models_page.py``."""
    script = runpy.run_path(str(ROOT / "tools/models_page.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert script["written"](page) == page
