"""The page on schemes shows the plans of published models as they are."""

from __future__ import annotations

import re
from pathlib import Path

import plan_page
import pytest

from qplug.planning.measured import SPEEDS

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
    four, fp8 = SPEEDS["W4A16"], SPEEDS["FP8_DYNAMIC"]
    reading = 1 / four.prompts - 1 / fp8.prompts
    writing = 1 / fp8.many - 1 / four.many
    assert f"saves {reading * 1e6:.1f} microseconds" in PAGE
    assert f"loses {writing * 1e6:.1f} a token" in PAGE
    assert f"longer than {writing / reading:.1f} times the answers" in PAGE
    assert f"{fp8.prompts / four.prompts:.2f} times as fast as `W4A16`" in PAGE
    assert four.one > max(fp8.one, SPEEDS["W8A8"].one)
    assert four.many > max(fp8.many, SPEEDS["W8A8"].many)
