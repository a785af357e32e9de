"""A finished run is measured against its float model, on text that calibration has not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import qplug
from qplug.calibration.samples import Samples
from qplug.cli.outcome import quality_line
from qplug.reading import quality as measured
from qplug.reading.predictions import mean_loss_of
from qplug.reading.quality import verdict_of
from qplug.run import check
from qplug.testing import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]

ROUNDED: dict[str, Any] = {"scheme": "W8A16", "group_size": 32, "backend": "fake", "device": "cpu"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_quality_is_the_perplexity_of_eval_and_the_divergence_from_float(
    tiny: Path, tmp_path: Path
) -> None:
    result = qplug.quantize(str(tiny), tmp_path / "out", check=True, **ROUNDED)
    quality = result.quality
    assert quality is not None
    assert result.notes == ()
    for folder, perplexity in (
        (tiny, quality.float_perplexity),
        (tmp_path / "out", quality.perplexity),
    ):
        alone = qplug.evaluate(
            str(folder), windows=quality.windows, seq_len=quality.seq_len, device="cpu"
        )
        assert alone.dataset == quality.dataset == "demo"
        assert perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert 0 < quality.kl < 0.01
    assert quality.verdict == "good"
    assert any(stage.name == "checking" for stage in result.stages)


def test_nothing_is_measured_unless_asked(tiny: Path, tmp_path: Path) -> None:
    assert qplug.quantize(str(tiny), tmp_path / "out", **ROUNDED).quality is None


def test_the_command_measures(
    tiny: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QPLUG_CHECK")
    words = ("--scheme", "W8A16", "--group-size", 32, "--backend", "fake", "--device", "cpu")
    done = cli("quantize", tiny, "--out", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("quality: "))
    assert line.startswith("quality: good; perplexity ")
    assert line.endswith("tokens of demo that calibration did not use")
    assert "checking" in done.stderr.splitlines()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("_SECONDS", 0.0, "it would take about "), ("_MOST_LOGITS", 0, "the vocabulary is too large")],
)
def test_what_is_not_measured_is_said(
    name: str, value: float, why: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, name, value)
    monkeypatch.setattr(check, "_SHARE", 0.0)
    result = qplug.quantize(str(tiny), tmp_path / "out", check=True, **ROUNDED)
    assert result.quality is None
    (note,) = result.notes
    assert note.startswith(f"the quality was not measured: {why}")


@pytest.mark.slow
def test_text_that_calibration_used_is_left_out(tiny: Path, tmp_path: Path) -> None:
    text = "".join(f"{number} times {number} is {number * number}. " for number in range(2500))
    (tmp_path / "mine.txt").write_text(text)
    words = {**ROUNDED, "algo": "gptq", "samples": 1, "seq_len": 64, "dataset": "text"}
    words |= {"dataset_options": {"path": str(tmp_path / "mine.txt"), "order": "sequential"}}
    result = qplug.quantize(str(tiny), tmp_path / "out", check=True, **words)
    assert result.quality is not None
    assert result.quality.dataset == "text"
    (tmp_path / "mine.txt").write_text(text[:576])  # nine windows of 64 characters
    words |= {"samples": 9, "overwrite": True}
    result = qplug.quantize(str(tiny), tmp_path / "out", check=True, **words)
    assert result.quality is not None
    assert result.quality.dataset == "demo"


def test_a_window_is_seen_if_enough_tokens_in_a_row_are() -> None:
    tokens = torch.arange(1000)
    seen = check.shared_runs(Samples(tokens[None, :400]))
    assert seen(tokens[100:300])
    assert seen(tokens[340:600])  # its first 60 tokens
    assert not seen(tokens[395:600])
    assert not seen(tokens[400:600])
    assert not check.shared_runs(None)(tokens)


def test_verdicts() -> None:
    assert [verdict_of(*pair) for pair in ((0.01, 1.01), (0.05, 1.05), (0.1, 1.02))] == [
        *("good", "good", "noticeable")
    ]
    assert [verdict_of(*pair) for pair in ((0.02, 1.2), (0.31, 1.0), (0.1, 2.0))] == [
        *("noticeable", "broken", "broken")
    ]
    assert verdict_of(float("nan"), float("nan")) == "broken"
    assert measured.GOOD_KL < measured.BROKEN_KL


def test_the_loss_is_that_of_each_next_token() -> None:
    tokens = torch.tensor([[0, 1, 2], [2, 1, 0]])
    logits = torch.full((6, 3), -50.0)
    for row, following in enumerate([1, 2, 0, 1, 0, 0]):
        logits[row, following] = 0.0
    assert mean_loss_of(logits, tokens) == pytest.approx(0.0, abs=1e-6)
    logits[0] = 0.0
    assert mean_loss_of(logits, tokens) == pytest.approx(torch.tensor(3.0).log().item() / 4)


def test_the_line_says_verdict_and_numbers() -> None:
    quality = qplug.Quality(10.5, 10.0, 0.03, "good", 8, 256, "demo")
    assert quality_line(replace(quality, perplexity=11.0)).startswith(
        "quality: good; perplexity 11 (float 10, +10.0%), KL divergence 0.0300 nats a token, on 8"
    )


def test_ctrl_c_while_it_measures_loses_nothing(
    tiny: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qplug.run.quantize.check_quality", interrupt)
    words = ("--scheme", "W8A16", "--group-size", 32, "--backend", "fake", "--device", "cpu")
    stopped = cli("quantize", tiny, "--out", tmp_path / "out", *words, "--check")
    assert stopped.exit_code == 1
    assert f"{tmp_path / 'out'}: is complete; its quality was not measured." in stopped.stderr
    assert (tmp_path / "out" / "qplug.json").is_file()
