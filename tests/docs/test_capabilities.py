"""docs/engines.md says what the tables of capabilities say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_tables_say() -> None:
    """If not: ``python tools/capabilities.py``."""
    script = runpy.run_path(str(ROOT / "tools/capabilities.py"))
    text = (ROOT / "docs/engines.md").read_text()
    assert script["page"](text) == text
    for backend in ("awq", "gptq", "sglang", "vllm"):
        assert f"### `{backend}`" in text
