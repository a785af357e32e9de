"""Tiny models of many architectures, quantized and verified: those that came through still do."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.catalogue import CATALOGUE, family_of
from zoo.make import make
from zoo.results import COMMITTED, read_results
from zoo.steps import RUNS, quantized_folder

STREAMED, CALIBRATED = "rtn W4A16 vllm", "gptq W4A16 vllm"
#: Models of which each has something that no other here has, and what they are taken through:
#: calibration of experts takes long.
FEW = {
    "gemma3": (STREAMED, CALIBRATED),
    "nemotron_h": (STREAMED, CALIBRATED),
    "olmo2": (STREAMED, CALIBRATED),
    "qwen3_embedding": (STREAMED, CALIBRATED),
    "qwen3_vl": (STREAMED, CALIBRATED),
    "gemma4_moe": (STREAMED,),
    "deepseek_v32": (STREAMED,),
    "qwen3_5_moe_hubfused": (STREAMED,),
    "glm4_moe_mtp_outside": (STREAMED,),
    "lfm2": (STREAMED,),
}
RESULTS = read_results(COMMITTED)


@pytest.mark.parametrize("name", FEW)
def test_few(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / name)
    for run in FEW[name]:
        ended, _ = quantized_folder(model, tmp_path / run, RUNS[run])
        assert ended.outcome == "ok", f"{run}: {ended.says}"


@pytest.mark.slow
@pytest.mark.parametrize("run", [STREAMED, CALIBRATED])
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_all(name: str, run: str, tmp_path: Path) -> None:
    """What came through still does; what was refused may come through, and is never unsound."""
    model = make(name, tmp_path / name)
    ended, _ = quantized_folder(model, tmp_path / "out", RUNS[run])
    allowed = {"ok"} if RESULTS[name][run]["outcome"] == "ok" else {"ok", "refused"}
    assert ended.outcome in allowed, ended.says


def test_the_results_are_of_the_catalogue() -> None:
    """If not: ``python -m zoo run docs/models.json`` tries what is new."""
    assert set(RESULTS) == set(CATALOGUE)
    for name, found in RESULTS.items():
        assert found["architecture"] == CATALOGUE[name].architecture
        assert found["family"] == family_of(name)
        assert "crash" not in {found[run]["outcome"] for run in RUNS if run in found}
