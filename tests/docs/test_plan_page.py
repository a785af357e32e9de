"""The page on schemes shows the plans of published models as they are."""

from __future__ import annotations

import re
from pathlib import Path

import plan_page
import pytest

from qplug.planning.speed import timing_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/choose-a-scheme.md").read_text("utf-8")


@pytest.mark.slow
def test_the_tables_are_up_to_date() -> None:
    """If not: ``PYTHONPATH=tests python tools/plan_page.py``."""
    assert plan_page.page(PAGE) == PAGE


def test_every_perplexity_is_in_the_results() -> None:
    results = (ROOT / "benchmarks/RESULTS.md").read_text("utf-8")
    part = PAGE.partition("## How much accuracy it costs")[2].partition("\n## ")[0]
    figures = set(re.findall(r"\b3\.\d{4}\b", part))
    assert len(figures) > 10
    assert {figure for figure in figures if figure not in results} == set()


def test_the_advice_follows_from_the_measured_speeds() -> None:
    """The page states how long a prompt must be for fp8 to be faster than 4 bits."""
    speeds = timing_of(has_experts=False).speeds
    four, fp8, int8 = speeds["W4A16"], speeds["FP8_DYNAMIC"], speeds["W8A8"]
    reading = 1 / four.reading - 1 / fp8.reading
    writing = 1 / fp8.writing[32] - 1 / four.writing[32]
    assert f"saves {reading * 1e6:.1f} microseconds" in PAGE
    assert f"loses {writing * 1e6:.1f} a token" in PAGE
    assert f"longer than {writing / reading:.1f} times the answers" in PAGE
    assert f"{fp8.reading / four.reading:.2f} times as fast as `W4A16`" in PAGE
    for requests in (1, 32):
        assert four.writing[requests] > max(fp8.writing[requests], int8.writing[requests])
