"""``qplug plan``: what it prints, and that its commands are ones that qplug takes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from published import LLAMA_3_8B, LLAMA_3_70B

from qplug.planning.measured import LOSSES, RATES
from qplug.planning.speed import timing_of
from qplug.planning.speeds import TIMINGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3 70B, of which only headers are written."""
    return LLAMA_3_70B.write(tmp_path_factory.mktemp("models") / "llama-3-70b")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3 8B, of which only headers are written."""
    return LLAMA_3_8B.write(tmp_path_factory.mktemp("models") / "llama-3-8b")


def told(cli: Cli, *words: object) -> dict[str, Any]:
    result = cli("plan", *words, "--json")
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_a_large_model_on_two_gpus(cli: Cli, big: Path) -> None:
    text = cli("plan", big, "--gpu", "H100x2").stdout
    assert "llama, 70.6 billion weights in 80 blocks, 141.1 GB in bfloat16" in text
    assert "KV cache: 327,680 bytes a token; a request of 8192 tokens takes 2.7 GB" in text
    row = next(line for line in text.splitlines() if line.startswith("W4A16 ") and "vllm" in line)
    assert row.split()[-9:-5] == ["GB", "42", "75", "+4.4%"]
    assert "for latency, one request at a time: NVFP4A16 by vllm" in text
    assert "39.5 GB on 2 GPUs, room for 42 requests of 8192 tokens" in text
    assert "an estimate, scaled from vLLM 0.26 on one H200" in text
    assert f"$ qplug quantize {big} --algo gptq --scheme W4A16 --backend vllm" in text
    lines = [line for line in text.splitlines() if "$ qplug" not in line]
    assert max(map(len, lines[1:])) <= 110


def test_the_order_of_proposals(cli: Cli, small: Path) -> None:
    plan = told(cli, small, "--gpu", "L40S", "--for", "size")
    assert [each["for"] for each in plan["proposals"]] == ["size", "latency", "throughput"]


def test_what_does_not_fit(cli: Cli, big: Path) -> None:
    result = cli("plan", big, "--gpu", "4090")
    assert result.exit_code == 0
    assert "nothing that is served fits" in result.stdout
    assert (
        "take more GPUs, fewer --requests, a shorter --context or --kv-cache fp8" in result.stdout
    )
    plan = told(cli, big, "--gpu", "4090")
    assert all(offer["requests"] == 0 for offer in plan["offers"])
    assert [each["offer"] for each in plan["proposals"]] == [None] * 3


def test_requests_and_context_decide(cli: Cli, big: Path) -> None:
    """Twenty requests of 32768 tokens take 215 GB of cache, in fp8 half of that."""
    words = (big, "--gpu", "H100x2", "--requests", 20, "--context", 32768)
    assert told(cli, *words)["proposals"][0]["offer"] is None
    with_fp8 = told(cli, *words, "--kv-cache", "fp8")
    assert with_fp8["cache"]["bytes_per_token"] == 163_840
    first = with_fp8["proposals"][0]
    assert first["offer"]["scheme"] == "NVFP4A16"
    assert first["offer"]["requests"] >= 20
    assert "--kv-cache fp8" in first["commands"][0]


@pytest.mark.parametrize("gpu", ["H100x2", "4090", "A100-40x8", "B200", "cpu"])
def test_commands_are_ones_that_qplug_takes(gpu: str, cli: Cli, tmp_path: Path) -> None:
    plan = told(cli, "qplug:demo", "--gpu", gpu, "--context", 512)
    seen = set()
    for proposal in plan["proposals"]:
        quantize, serve = (shlex.split(line) for line in proposal["commands"])
        if tuple(quantize) in seen:
            continue
        seen.add(tuple(quantize))
        quantize[-1] = str(tmp_path / quantize[-1])
        result = cli(*quantize[1:], "--dry-run", "--samples", 2, "--seq-len", 16)
        assert result.exit_code == 0, result.output
        assert serve[:2] == ["qplug", "serve"]
    assert seen


def test_a_context_beyond_what_the_model_takes(cli: Cli) -> None:
    result = cli("plan", "qplug:demo", "--gpu", "H100")
    assert result.stderr == "the model takes at most 1024 tokens: planned for requests of 1024\n"
    assert "a request of 1024 tokens takes 2.1 MB" in result.stdout
    assert result.stdout.count("--max-model-len 1024") > 0
    assert cli("plan", "qplug:demo", "--gpu", "H100", "--context", 1000).stderr == ""


def test_one_backend(cli: Cli, small: Path) -> None:
    plan = told(cli, small, "--gpu", "H100", "--backend", "sglang")
    assert {offer["backend"] for offer in plan["offers"]} == {"sglang"}
    serve = plan["proposals"][0]["commands"][1]
    assert serve.endswith("-- --context-length 8192")
    wrong = cli("plan", small, "--gpu", "H100", "--backend", "vlm")
    assert "no backend 'vlm'. Did you mean 'vllm'?" in wrong.stderr


def test_a_format_of_several_engines(cli: Cli, small: Path) -> None:
    """Its folders are served by an engine that is named."""
    plan = told(cli, small, "--gpu", "H100", "--backend", "awq")
    quantize, serve = plan["proposals"][0]["commands"]
    assert "--algo awq --scheme W4A16_ASYM --backend awq" in quantize
    assert serve == ("qplug serve ./llama-3-8b-W4A16_ASYM --backend vllm -- --max-model-len 8192")


def test_where_nothing_was_measured(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qplug.planning.plan.LOSSES", {})
    text = cli("plan", small, "--gpu", "H100", "--for", "size").stdout
    first = text.partition("for size")[2].partition("for latency")[0]
    assert "loss   not measured: compare both models with qplug eval" in first
    assert "--algo gptq --scheme W2A16 " in first


def test_speeds_where_they_were_measured(cli: Cli, small: Path) -> None:
    """On the GPU and the shape of the measurement, the estimate is what was measured."""
    timing = timing_of(has_experts=False)
    for number in timing.speeds[""].writing:
        plan = told(cli, small, "--gpu", timing.gpu, "--context", 109, "--requests", number)
        offers = [offer for offer in plan["offers"] if offer["backend"] == "vllm"]
        found = {offer["scheme"]: offer["tokens_per_second"] for offer in offers}
        found[""] = plan["float"]["tokens_per_second"]
        for scheme, speed in timing.speeds.items():
            assert found[scheme]["one"] == pytest.approx(speed.writing[1], rel=0.01), scheme
            assert found[scheme]["many"] == pytest.approx(speed.writing[number], rel=0.01), scheme
        assert found["FP8"]["one"] is None  # nobody has timed it


def test_a_model_of_experts_takes_the_timing_of_experts_where_there_is_one() -> None:
    timed = any(timing.experts for timing in TIMINGS)
    assert bool(timing_of(has_experts=True).experts) == timed


def test_losses_are_what_the_results_say() -> None:
    timed = {scheme for timing in TIMINGS for scheme in timing.speeds}
    assert {*RATES} >= {scheme for scheme in timed if scheme.startswith(("W8A8", "FP8", "W4AFP8"))}
    results = (ROOT / "benchmarks/RESULTS.md").read_text()
    for scheme, loss in LOSSES.items():
        assert f"{loss.perplexity:.4f}" in results, scheme
        assert f"{loss.base:.4f}" in results


def test_errors(cli: Cli, tmp_path: Path) -> None:
    assert cli("plan", "nowhere", "--gpu", "cpu").stderr == "Error: nowhere: no such folder\n"
    assert "name it: H20, H100" in cli("plan", "qplug:demo", "--gpu", "sm90").stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli("plan", empty, "--gpu", "cpu").exit_code == 1
