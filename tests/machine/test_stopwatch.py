"""Stages: time counts once, memory peaks are seen, and a run tells them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import qplug
from qplug.machine import stopwatch
from qplug.machine.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows: to be set."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: now[0])
    return now


def test_time_counts_to_the_innermost_stage(clock: list[float]) -> None:
    watch = Stopwatch()
    clock[0] = 1.0  # before any stage
    with watch("outer"):
        clock[0] = 3.0
        with watch("inner"):
            clock[0] = 7.0
        clock[0] = 7.5
    clock[0] = 50.0
    with watch("inner"):
        clock[0] = 51.0
    assert [(c.name, c.seconds) for c in watch.costs()] == [("outer", 2.5), ("inner", 5.0)]


def test_a_stage_that_fails_ends(clock: list[float]) -> None:
    watch = Stopwatch()
    with watch("outer"):
        with suppress(ValueError), watch("inner"):
            clock[0] = 1.0
            raise ValueError
        clock[0] = 3.0
    assert [cost.seconds for cost in watch.costs()] == [2.0, 1.0]


def test_memory() -> None:
    watch = Stopwatch()
    with watch("small"):
        pass
    with watch("large"):
        held = torch.ones(60_000_000)
    del held
    small, large = watch.costs()
    assert small.memory is not None
    assert large.memory is not None
    assert small.memory > 50_000_000  # torch alone is
    assert large.memory > small.memory
    assert large.gpu_memory is None


def test_a_peak_of_before_is_not_one_of_this_stage() -> None:
    torch.ones(100_000_000).sum()
    watch = Stopwatch()
    with watch("after"):
        pass
    (after,) = watch.costs()
    assert after.memory is not None
    peak = stopwatch._Resident().peak()
    assert after.memory < peak


@pytest.mark.parametrize(
    ("algo", "wanted"),
    [
        ("rtn", {"opening", "reading", "transform", "quantize", "errors", "pack", "writing"}),
        (
            "awq",
            {"opening", "data", "embedding", "reading", "statistics", "transform", "quantize"}
            | {"errors", "pack", "passing on", "writing"},
        ),
    ],
)
def test_a_run_tells_its_stages(
    algo: str, wanted: set[str], family: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"awq": {"ratios": "2", "clip": "false"}} if algo == "awq" else {}
    result = qplug.quantize(
        str(family("llama")),
        tmp_path / "out",
        algo=algo,
        algorithm_options=options,
        group_size=16,
        backend="compressed-tensors",
        samples=2,
        seq_len=16,
    )
    assert {stage.name for stage in result.stages} == wanted
    assert 0 < sum(stage.seconds for stage in result.stages) <= result.seconds
