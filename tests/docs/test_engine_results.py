"""docs/engines.md holds the results of docs/engine_results, and its script writes them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_spec = importlib.util.spec_from_file_location("write_table", ROOT / "tools/write_table.py")
assert _spec is not None
assert _spec.loader is not None
write_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(write_table)


def test_the_page_is_up_to_date() -> None:
    text = (DOCS / "engines.md").read_text("utf-8")
    assert write_table.page(text) == text
    assert "### CPU (x86_64, avx2), 2" in text
    assert "### CPU (x86_64, avx2, avx512_bf16, avx512_vnni, avx512f), 2" in text
    assert "### NVIDIA H100 80GB HBM3, 2" in text


def test_a_row_beyond_its_limits_says_so() -> None:
    results = sorted((DOCS / "engine_results").glob("*.json"))
    assert results
    for path in results:
        rows = json.loads(path.read_text("utf-8"))["rows"]
        assert rows, path.name
        for row in rows:
            note = row.get("note", "")
            most = 0.2 if "saturate" in note else 0.1
            if "inputs stay" not in note:
                most = max(most, 1.1 * row.get("rounding", 0))
            assert (row["difference"] >= most) <= ("difference" in note), row
            if "scheme" in row:
                away = abs(row["perplexity"] / row["qplug eval"] - 1)
                assert (away > 0.01) == ("and perplexity" in note or ": perplexity" in note), row


def test_a_table() -> None:
    told = {
        "date": "2026-01-02",
        "qplug": "9",
        "machine": "x86_64",
        "device": "cpu",
        "versions": {"vllm": "vllm 1"},
        "rows": [{"case": "a", "difference": 0.5}],
        "failed": {"c": "crashed"},
        "left out": {"b": "cannot"},
    }
    lines = write_table.table(told).splitlines()
    assert lines[0] == "### CPU (x86_64), 2026-01-02"
    assert lines[2] == "qplug 9, vllm 1; 8 windows of 128 tokens."
    assert "| a | 0.5 |  |  |  |  |  |" in lines
    assert "Failed: `c`: crashed" in lines
    assert lines[-1] == "- `b`: cannot"
