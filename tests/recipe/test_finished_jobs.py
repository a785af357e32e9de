"""A job that was stopped keeps the folders that it wrote, and no folder of another recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Cli = Callable[..., Result]
RunTwice = Callable[[Mapping[str, Any], Mapping[str, Any]], Result]

FEW = {"samples": 2, "seq_len": 16}
STATIC = {"scheme": "FP8", "calibration": FEW}
AWQ = {"pipeline": ["smoothquant"], "scheme": "W8A8", "calibration": FEW}


@pytest.fixture
def run_twice(cli: Cli, tmp_path: Path) -> RunTwice:
    """Writes the folders ``a`` and ``b`` of one file, loses ``b``, and runs another file."""

    def run(first: Mapping[str, Any], second: Mapping[str, Any]) -> Result:
        file, result = tmp_path / "f.yml", None
        for said in (first, second):
            exports = [{"out": str(tmp_path / name), "backend": "vllm"} for name in "ab"]
            for export, own in zip(exports, said.get("own", ()), strict=False):
                export.update(own)
            whole = {"model": "qplug:demo", "export": exports, **said}
            whole.pop("own", None)
            file.write_text(json.dumps(whole))
            if result is not None:
                shutil.rmtree(tmp_path / "b")
            result = cli("quantize", "--config", file, "--device", "cpu")
            if said is first:
                assert result.exit_code == 0, result.output
        return result

    return run


@pytest.mark.parametrize(
    "said",
    [
        {},
        {**STATIC, "calibration": {**FEW, "observer": "histogram"}},
        {**STATIC, "calibration": {**FEW, "batch_size": 1}},
        {"kv_cache": "fp8", "calibration": FEW},
        {"own": [{"options": {"tp": 2}}]},
        {"scheme": "WE2M1A16", "own": [{"backend": "fake"}, {"backend": "hf"}]},
        {**AWQ, "own": [{"backend": "hf"}]},
    ],
    ids=str,
)
@pytest.mark.slow
def test_the_same_job_goes_on(said: Mapping[str, Any], run_twice: RunTwice, tmp_path: Path) -> None:
    again = run_twice(said, said)
    assert again.exit_code == 0, again.output
    assert f"{tmp_path}/a: was written by an earlier run" in again.stdout


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"calibration": FEW}, {"kv_cache": "fp8", "calibration": FEW}),
        ({}, {"own": [{"options": {"tp": 2}}]}),
        ({}, {"seed": 1}),
        (STATIC, {**STATIC, "calibration": {**FEW, "observer": "histogram"}}),
        (STATIC, {**STATIC, "calibration": {**FEW, "batch_size": 1}}),
        (STATIC, {**STATIC, "calibration": {**FEW, "propagate": "float"}}),
    ],
    ids=str,
)
def test_another_job_does_not(
    first: Mapping[str, Any], second: Mapping[str, Any], run_twice: RunTwice, tmp_path: Path
) -> None:
    other = run_twice(first, second)
    assert other.exit_code == 1
    assert f"{tmp_path}/a: exists" in other.output
