"""The page on schemes, its pictures and the plan's data say what the benchmark found."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from qplug.api.gpus import GPUS
from qplug.planning.speed import reading, timing_of, writing

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return runpy.run_path(str(ROOT / "tools/serving_gain.py"))


def test_what_the_benchmark_found_is_everywhere(script: dict[str, Any]) -> None:
    """If not: ``PYTHONPATH=benchmarks python tools/serving_gain.py``."""
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


def test_the_sentences_below_the_tables_quote_them() -> None:
    text = (DOCS / "how-to/choose-a-scheme.md").read_text("utf-8")
    tables, _, after = text.partition("<!-- begin: serving gain -->")[2].partition("<!-- end")
    sentences = after.partition("\n## ")[0]
    figures = set(re.findall(r"\b\d\.\d\d\b", sentences))
    assert len(figures) > 8
    assert {figure for figure in figures if f"({figure} x)" not in tables} == set()


def test_the_estimate_for_another_gpu_is_near_to_what_was_timed_there() -> None:
    """The page says how near: older rows of an H100 are beside those that plans are scaled from."""
    timing = timing_of(has_experts=False)
    rows = json.loads((DOCS / "serving_gain.json").read_text("utf-8"))["rows"]
    others = [row for row in rows if "H100" in row["device"] and row["shape"] == timing.shape]
    assert timing.gpu != "H100"
    assert len(others) == 4
    for row in others:
        scheme = row["scheme"].removeprefix("bf16")
        work = timing.work(scheme)
        for requests in (1, 32):
            cache = requests * timing.tokens * timing.cache
            speed = writing(scheme, work, GPUS["H100"], 1, requests, cache)
            assert speed == pytest.approx(row[f"decode {requests}"], rel=0.12)
        read = reading(scheme, work, GPUS["H100"], 1)
        assert read == pytest.approx(row["prefill 8 x 2048"], rel=0.12)


def _row(scheme: str, one: float, many: float, prompts: float) -> dict[str, Any]:
    return {
        "shape": "Llama 3 8B",
        "layers": 32,
        "scheme": scheme,
        "date": "2026-11-28",
        "device": "NVIDIA H200",
        "versions": {"vllm": "0.26.0"},
        "decode 1": one,
        "decode 256": many,
        "prefill 256 x 1024": prompts,
    }


def test_the_advice_follows_from_what_was_measured(script: dict[str, Any]) -> None:
    rows = [
        _row("bf16", 100, 10_000, 50_000),
        _row("W4A16", 200, 12_500, 40_000),
        _row("FP8_DYNAMIC", 150, 10_000, 80_000),
        _row("W8A8", 203, 16_000, 80_500),
    ]
    lines = script["advice"]({"rows": rows}).splitlines()
    taken = [line.split(" | ")[1:] for line in lines if "a dense model" in line]
    assert taken[0] == [  # W8A8 is nearly as fast
        "`W4A16` with `gptq`",
        "it wrote 2.00 times as fast as bf16, `W8A8` 2.03 times |",
    ]
    assert [each[0] for each in taken[1:]] == [
        "`W8A8` with `smoothquant`",
        "`FP8_DYNAMIC` with `rtn`",
        "`W8A8` with `smoothquant`",
    ]
    # 1/40,000 - 1/80,000 of a second, and 1/10,000 - 1/12,500
    assert lines[-1] == (
        "- Llama 3 8B, 256 requests: `FP8_DYNAMIC` saves 12.5 microseconds for a token that is "
        "read and loses 20.0 for one that is written, beside `W4A16`: it is ahead where prompts "
        "are longer than 1.6 times the answers."
    )
    rows[2]["decode 256"] = 20_000
    assert "whatever the lengths are" in script["advice"]({"rows": rows})


def test_a_row_that_failed_is_not_shown_and_another_gpu_has_its_own_table(
    script: dict[str, Any],
) -> None:
    rows = [_row("bf16", 100, 10_000, 50_000), _row("W8A8", 150, 10_000, 80_000)]
    slow = [_row("bf16", 90, 9_000, 40_000), _row("W8A8", 120, 9_500, 60_000)]
    old = [{**row, "device": "NVIDIA H100 80GB HBM3", "date": "2026-11-25"} for row in slow]
    alone = {**_row("bf16", 300, 30_000, 200_000), "shape": "Qwen3 30B A3B"}
    failed = {"shape": "Llama 3 8B", "scheme": "W4AFP8", "error": "no kernel"}
    text = script["section"]({"rows": [*old, *rows, alone, failed]})
    assert text.count("| `bf16` |") == 3
    assert text.index("NVIDIA H200") < text.index("NVIDIA H100")
    assert "W4AFP8" not in text
    assert text.endswith("| `bf16` | 300 (1.00 x) | 30,000 (1.00 x) | 200,000 (1.00 x) |")
    assert "No scheme was timed yet" in text
    assert 'gpu="H200"' in script["data"]({"rows": [*old, *rows]})
