"""Folders that the backends wrote, made once for all tests, and the exporters by name."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

import qplug
from qplug_compressed_tensors.exporter import CompressedTensorsExporter
from qplug_sglang.exporter import SGLangExporter
from qplug_vllm.exporter import VLLMExporter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qplug import Exporter

    Quantized = Callable[..., Path]


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """``quantized("W4A16", group_size=32, backend="vllm")``: a folder to read, not to change."""
    made: dict[str, Path] = {}

    def quantize(scheme: str, *, model: str = "qplug:demo", **options: Any) -> Path:
        key = f"{model} {scheme} {sorted(options.items())}"
        if key not in made:
            out = tmp_path_factory.mktemp("quantized") / "out"
            few = {"samples": 4, "seq_len": 64}  # for schemes that calibrate
            made[key] = qplug.quantize(
                model, out, scheme=scheme, device="cpu", **{**few, **options}
            ).out
        return made[key]

    return quantize


@pytest.fixture(scope="session")
def narrow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a head of its own, too narrow for the kernels of any engine."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qplug.checkpoint.locate import find_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("narrow")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(find_model("qplug:demo") / "tokenizer.json", folder)
    return folder


@pytest.fixture(
    params=[CompressedTensorsExporter, VLLMExporter, SGLangExporter], ids=lambda kind: kind.name
)
def exporter(request: pytest.FixtureRequest) -> Exporter[Any]:
    kind: type[Exporter[Any]] = request.param
    return kind(kind.Params())
