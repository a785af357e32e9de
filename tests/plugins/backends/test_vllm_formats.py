"""Formats of vLLM 0.33 with the algorithms, dense and for experts: written, verified, read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qplug
from qplug import Registry, open_checkpoint
from qplug.checkpoint.locate import find_model
from qplug.machine.session import Session
from qplug.reading.folder import open_folder

Quantized = Callable[..., Path]

SCHEMES = ("W2A16", "W3A16_ASYM", "W6A16", "W4A8", "MXFP8", "MXFP4", "MXFP4AFP8", "FP8A16")
SHORT = {"ratios": 2, "clip_steps": 3, "clip_in_search": 1}
pytestmark = pytest.mark.slow


def check(out: Path, scheme: str) -> None:
    """Verified by rule, and read by the reader of checkpoints as by the exporter's own."""
    assert qplug.verify(str(out)).ok
    folder = open_folder(str(out), Session.alone())
    assert {found.name for found in folder.schemes.values()} == {scheme}
    floats = open_checkpoint(out, readers=Registry.installed().sources)
    for name in folder.schemes:
        stored = floats.read(f"{name}.weight").float()
        assert torch.equal(stored, folder.dequantized(name).bfloat16().float()), name


@pytest.mark.parametrize("algo", ["rtn", "gptq", "awq+gptq"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dense(quantized: Quantized, scheme: str, algo: str) -> None:
    options = {"awq": SHORT} if "awq" in algo else {}
    check(quantized(scheme, backend="vllm", algo=algo, algorithm_options=options), scheme)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of four experts, 128 wide."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("mixture")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / file, folder)
    return folder


@pytest.mark.parametrize("algo", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("W4A8", "FP8A16")])
def test_experts(quantized: Quantized, mixture: Path, scheme: str, algo: str) -> None:
    size = 64 if scheme.startswith("W") else None
    out = quantized(
        scheme,
        model=str(mixture),
        backend="vllm",
        algo=algo,
        group_size=size,
        algorithm_options={"awq": SHORT} if algo == "awq" else {},
    )
    check(out, scheme)
    assert sum(".experts." in name for name in open_folder(str(out), Session.alone()).schemes) == 12
