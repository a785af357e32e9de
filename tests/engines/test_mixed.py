"""The real vLLM computes with a folder of several schemes that ``--scheme auto`` chose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_folders import read
from real_engines import VLLM_ON_CPU

import qplug
from qplug.machine.session import Session
from qplug.reading.perplexity import evaluation_tokens

#: The limit of the other engine tests for schemes that round inputs: see docs/engines.md.
LIMIT = 0.1


@pytest.mark.engine
def test_vllm_computes_with_a_chosen_mixture(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    result = qplug.quantize(
        "qplug:demo",
        folder,
        scheme="auto",
        bits=5,
        backend="vllm",
        backend_options={"gpu": "cpu"},
        samples=16,
        seq_len=128,
        device="cpu",
    )
    assert result.choice is not None
    assert len({group.scheme for group in result.choice.groups}) > 2
    assert qplug.verify(str(folder)).ok
    session = Session.alone()
    prompts = evaluation_tokens(
        "qplug:demo", session, dataset="demo", dataset_options=None, seq_len=128, windows=4
    )
    task = {"folder": str(folder), "dtype": "auto", "options": VLLM_ON_CPU.options_for(folder)}
    with VLLM_ON_CPU.started(prompts.tolist(), tmp_path) as running:
        running.give("mixed", task)
        answer = running.answers()["mixed"]
    assert "error" not in answer, answer["error"]
    expected = read(folder, prompts, quantize_activations=False)
    assert (torch.tensor(answer["logprobs"]) - expected).abs().mean() < LIMIT
