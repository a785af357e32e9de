"""Experts in int4 with fp8 inputs for SGLang: written, read, verified, and nothing beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from spoilt import forget_checksums

import qplug
from qplug import ModelView, preset
from qplug.api.limits import Target
from qplug.checkpoint.locate import find_model
from qplug.machine.session import Session
from qplug.reading.folder import open_folder
from qplug_sglang.exporter import SGLangExporter

if TYPE_CHECKING:
    from collections.abc import Callable

    Quantized = Callable[..., Path]

SM90 = {"gpu": "sm90"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random mixture of four experts, wider than a group."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("mixture")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / file, folder)
    return str(folder)


@pytest.fixture
def coded(quantized: Quantized, mixture: str) -> Path:
    how: dict[str, Any] = {"backend": "sglang", "backend_options": SM90, "model": mixture}
    return quantized("W4AFP8", ignore=["*self_attn*"], **how)


def test_experts_are_written_read_and_verified(coded: Path) -> None:
    folder = open_folder(str(coded), Session.alone())
    assert {scheme.name for scheme in folder.schemes.values()} == {"W4AFP8"}
    assert len(folder.schemes) == 2 * 4 * 3
    assert all(".experts." in name for name in folder.schemes)
    told = folder.checkpoint.config["quantization_config"]
    (group,) = QuantizationConfig.model_validate(told).config_groups.values()
    assert (told["format"], group.targets) == ("pack-quantized", ["Linear"])
    pack = BaseCompressor.get_value_from_registry("pack-quantized")
    for name in folder.schemes:
        theirs = pack.decompress(folder.packed(name), group)["weight"]
        assert torch.equal(folder.parameter(f"{name}.weight").to(theirs.dtype), theirs), name
    for backend in ("sglang", "vllm", "compressed-tensors"):
        assert qplug.verify(str(coded), backend=backend).ok


def test_the_group_is_for_the_class(coded: Path, tmp_path: Path) -> None:
    """SGLang looks the scheme of experts up by the word Linear."""
    broken = forget_checksums(shutil.copytree(coded, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["targets"] = [r"re:.*\.experts\..*"]
    (broken / "config.json").write_text(json.dumps(config))
    (problem,) = qplug.verify(str(broken), backend="sglang").problems
    assert str(problem) == (
        r"order: re:.*\.experts\..*: SGLang 0.5.23 asks for W4AFP8 in the group for Linear"
    )
    assert qplug.verify(str(broken), backend="vllm").ok


def refusal(gpu: str, *schemes: str | None, engine: str = "newest") -> str | None:
    """What is said to the schemes of q_proj and of two experts."""
    names = ["a.q_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj"]
    linears = {f"layers.0.{name}": (128, 128) for name in names}
    model = ModelView({}, "bfloat16", linears, frozenset(linears), ("layers.0",), None)
    pairs = zip(linears, schemes, strict=True)
    exporter = SGLangExporter(Target(gpu, engine=engine))
    return exporter.refuses(model, {name: preset(each) for name, each in pairs if each})


@pytest.mark.parametrize(
    ("gpu", "schemes", "said"),
    [
        ("sm90", (None, "W4AFP8", "W4AFP8"), None),
        ("any", (None, "W4AFP8", "W4AFP8"), None),
        (
            "sm90",
            ("W4AFP8", "W4AFP8", "W4AFP8"),
            "in experts alone: add --ignore layers.0.a.q_proj",
        ),
        (
            "sm90",
            ("W4A16", "W4AFP8", "W4AFP8"),
            "only where all other linears are float, not W4A16",
        ),
        ("sm90", ("FP8_DYNAMIC", "W4AFP8", "W4AFP8"), "runs experts in W4AFP8 only in a folder of"),
        ("sm90", (None, "W4A16", "W4AFP8"), "must share one scheme"),
        ("sm100", (None, "W4AFP8", "W4AFP8"), "is for sm90 alone"),
        ("sm89", (None, "W4AFP8", "W4AFP8"), "is for sm90 alone"),
    ],
)
def test_what_is_refused(gpu: str, schemes: tuple[str | None, ...], said: str | None) -> None:
    found = refusal(gpu, *schemes)
    assert found is None if said is None else said in str(found)


def test_an_older_version_is_not_known_to_run_them() -> None:
    found = refusal("sm90", None, "W4AFP8", "W4AFP8", engine="0.5.16")
    assert "for experts alone" in str(found)
