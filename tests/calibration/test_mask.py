"""Tokens that are masked pass through the model, but sums, samples and losses leave them out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import GENERATION, WriteChats, turns
from click.testing import Result
from torch import Tensor

import qplug
from qplug.api import Preparation
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.calibration.whole_model import InMemoryModel
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.view import model_view
from qplug.registry.registry import Registry
from qplug.testing.models import tiny_tokenizer, write_tiny_model

Family = Callable[..., Path]
MakeTokens = Callable[..., Tensor]
BLOCK = "model.layers.0"


def walk_of(folder: Path, samples: Samples, **changes: Any) -> Walk:
    source = open_checkpoint(folder)
    view = model_view(source)
    scheme = qplug.preset("W8A8_STATIC")
    schemes = dict.fromkeys(view.quantizable, scheme)
    return Walk(source, view, schemes, samples, Session(Registry([])), batch_size=2, **changes)


@pytest.fixture
def tokens(make_tokens: MakeTokens) -> Tensor:
    """Three samples of 20 tokens, the last of which has 7 tokens of padding."""
    tokens = make_tokens(3, 20)
    tokens[2, 13:] = -1
    return tokens


@pytest.fixture
def mask(tokens: Tensor) -> Tensor:
    return (torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.4) & (tokens >= 0)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_statistics_are_of_the_tokens_that_count(
    name: str, family: Family, tokens: Tensor, mask: Tensor
) -> None:
    """Ranges alone cover all tokens, since an engine rounds prompts under the same scales."""
    rest = ~mask & (tokens >= 0)
    walks = [
        walk_of(family(name), Samples(tokens, only), propagate="float")
        for only in (None, mask, rest)
    ]
    for groups in zip(*(walk.gather(BLOCK).groups for walk in walks), strict=True):
        for whole, part, other in zip(*(group.by_tokens for group in groups), strict=True):
            assert whole.tokens == part.tokens + other.tokens
            torch.testing.assert_close(whole.gram, part.gram + other.gram)
            for mean in ("mean", "mean_abs"):
                total = [getattr(group, mean) * group.tokens for group in (whole, part, other)]
                torch.testing.assert_close(total[0], total[1] + total[2])
            assert torch.equal(torch.cat([part.low, part.high]), torch.cat([whole.low, whole.high]))
        whole, part, _ = groups
        if whole.experts is None:
            assert torch.equal(part.sample, whole.sample[mask[tokens >= 0]])
            assert part.lows is not None
            assert whole.lows is not None
            assert torch.equal(part.lows, whole.lows)
    for walk in walks:
        walk.advance(BLOCK, {})
    assert all(map(torch.equal, walks[0].hidden, walks[1].hidden))


def test_drift_is_of_the_tokens_that_count(family: Family, tokens: Tensor, mask: Tensor) -> None:
    walks = [
        walk_of(family("llama"), Samples(tokens, m), with_drift=True)
        for m in (None, mask, ~mask & (tokens >= 0))
    ]
    drifts = []
    for walk in walks:
        block = walk.gather(BLOCK)
        changed = {n: w if "norm" in n else w * 1.1 for n, w in block.weights32.items()}
        scales = {f"{n.removesuffix('.weight')}.input_scale": torch.ones(1) for n in changed}
        walk.advance(BLOCK, {**changed, **scales})
        drifts.append(walk.gather("model.layers.1").groups[0].drift)
    torch.testing.assert_close(drifts[0], drifts[1] + drifts[2])


def test_a_reconstruction_is_of_the_tokens_that_count(
    family: Family, tokens: Tensor, mask: Tensor
) -> None:
    block = walk_of(family("llama"), Samples(tokens, mask), with_targets=True).gather(BLOCK)
    assert block.reconstruction is not None
    batches = [*block.reconstruction.batches()]
    assert torch.equal(torch.cat([batch.real for batch in batches if batch.real is not None]), mask)
    assert [batch.tokens for batch in batches] == [int(mask[:2].sum()), int(mask[2:].sum())]


def test_the_loss_of_a_whole_model_is_of_the_tokens_that_count(
    family: Family, tokens: Tensor, mask: Tensor
) -> None:
    source = open_checkpoint(family("llama"))
    view = model_view(source)
    schemes = dict.fromkeys(view.quantizable, qplug.preset("W8A8"))
    losses = []
    for only in (None, mask, ~mask & (tokens >= 0)):
        samples = Samples(tokens, only)
        whole = InMemoryModel(source, view, schemes, samples, Session(Registry([])), batch_size=3)
        losses.append(float(whole.loss(Preparation({}), 0)) * samples.count)
    assert losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-5)


def test_a_sample_with_its_own_inputs_is_a_batch_without_padding() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1], [7, -1, -1, -1], [8, 9, 9, 9]])
    pixels = {"pixel_values": torch.ones(2, 3)}
    samples = Samples(tokens, None, ({}, pixels, {}, {}))
    batches = samples.batches(2)
    assert [batch.tokens.tolist() for batch in batches] == [
        [[1, 2, 3, 4]],
        [[5, 6]],
        [[7, -1, -1, -1], [8, 9, 9, 9]],
    ]
    inputs = batches[1].inputs(torch.bfloat16)
    assert set(inputs) == {"input_ids", "pixel_values"}
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert set(batches[2].inputs(torch.bfloat16)) == {"input_ids"}
    assert [len(part) for part in samples.shared_by(3)] == [2, 1, 1]
    other = Samples(tokens, None, ({}, {"pixel_values": torch.zeros(2, 3)}, {}, {}))
    assert len({samples.digest(), other.digest(), Samples(tokens).digest()}) == 3


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GENERATION
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_on_a_mix_of_chats_and_text(
    tmp_path: Path, chat_model: Path, write_chats: WriteChats, cli: Callable[..., Result]
) -> None:
    chats = write_chats(*(turns(f"question {n}", f"answer {n}") for n in range(6)))
    (text := tmp_path / "notes.txt").write_text("A list is a sequence that can be changed. " * 9)
    words = (
        *("quantize", chat_model, "--algo", "gptq", "--group-size", 32, "--backend", "fake"),
        *("--dataset", "chats=text:4+text:2", "--samples", 6, "--seq-len", 48),
        *("--dataset-opt", f"chats.path={chats}", "--dataset-opt", f"text.path={text}"),
    )
    result = cli(*words, "--mask", "prompts", "--out", tmp_path / "masked")
    assert result.exit_code == 0, result.output
    recorded = json.loads((tmp_path / "masked/qplug.json").read_text())["recipe"]["calibration"]
    assert recorded["dataset"] == "chats=text:4+text:2"
    assert recorded["mask"] == "prompts"
    card = (tmp_path / "masked/README.md").read_text()
    assert (
        "Calibrated on 6 samples of up to 48 tokens of `chats=text:4+text:2`; statistics leave "
        "prompts out.\n" in card
    )
    assert cli(*words, "--out", tmp_path / "plain").exit_code == 0
    masked, plain = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("masked", "plain")
    )
    assert masked != plain


def test_a_model_without_a_chat_template_is_refused_in_one_line(
    tmp_path: Path, write_chats: WriteChats, cli: Callable[..., Result]
) -> None:
    model = write_tiny_model(tmp_path / "model")
    result = cli(
        *("quantize", model, "--algo", "gptq", "--dataset", "text", "--samples", 1),
        *("--dataset-opt", f"path={write_chats(turns('Hi', 'Ho'))}", "--seq-len", 8),
        *("--group-size", 32, "--backend", "fake", "--out", tmp_path / "out"),
    )
    assert result.exit_code == 1
    _, line = result.output.strip().splitlines()  # the first says that the model is opened
    assert "chats.jsonl:1: the model's tokenizer has no chat template" in line
    assert not (tmp_path / "out").exists()
