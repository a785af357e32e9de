"""The page on schemes shows the plans of published models as they are."""

from __future__ import annotations

import re
from pathlib import Path

import plan_page
import pytest

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
