"""The page on schemes, its pictures and the plan's data say what the benchmark found."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_what_the_benchmark_found_is_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """If not: ``PYTHONPATH=benchmarks python tools/serving_gain.py``."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = runpy.run_path(str(ROOT / "tools/serving_gain.py"))
    told = json.loads((DOCS / "serving_gain.json").read_text("utf-8"))
    text = (DOCS / "how-to/choose-a-scheme.md").read_text("utf-8")
    assert script["page"](text, told) == text
    assert script["data"](told) == script["DATA"].read_text("utf-8")
    for shape, (group, *_) in script["groups"](told).items():
        picture = (DOCS / script["SHAPES"][shape][2]).read_text("utf-8")
        assert script["picture"](group) == picture
        assert {"bf16", "W4A16", "W8A8", "FP8_DYNAMIC"} <= set(group)
        for scheme in set(group) - {"bf16"}:
            assert f">{scheme}</text>" in picture
