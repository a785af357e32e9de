"""The page on models shows the table of weights that engines build float."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import models_page


def test_the_page_has_the_table() -> None:
    page = models_page.PAGE.read_text(encoding="utf-8")
    assert models_page.written(page) == page, "run python tools/models_page.py"
