"""The page on schemes and its picture say what the benchmark found."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_page_and_its_picture_are_up_to_date() -> None:
    """If not: ``python tools/serving_gain.py``."""
    script = runpy.run_path(str(ROOT / "tools/serving_gain.py"))
    told = json.loads((DOCS / "serving_gain.json").read_text("utf-8"))
    text = (DOCS / "how-to/choose-a-scheme.md").read_text("utf-8")
    assert script["page"](text, told) == text
    picture = (DOCS / "serving_gain.svg").read_text("utf-8")
    assert script["picture"](script["served"](told)) == picture
    for scheme in ("bf16", "W4A16", "W8A8", "FP8_DYNAMIC"):
        assert f"one request: {scheme}" in picture
