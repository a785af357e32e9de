"""SGLang reads weights of latent projections itself, and runs packed experts with SiLU alone."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from zoo.make import make

import qplug
from qplug.checkpoint.locate import find_model
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.reading.folder import open_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Quantized = Callable[..., Path]

READ = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj")
KINDS = [f"*.{name}" for name in READ]


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make("deepseek_v3", tmp_path_factory.mktemp("latent") / "model"))


@pytest.fixture(scope="module")
def gelu(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make("gemma4_moe", tmp_path_factory.mktemp("gelu") / "model"))


def test_latent_projections_are_refused_where_they_are_much_of_a_model(
    latent: str, tmp_path: Path
) -> None:
    with pytest.raises(QplugError, match="SGLang reads its weight itself, which W4A16 packs") as no:
        qplug.quantize(latent, tmp_path / "q", scheme="W4A16", backend="sglang")
    assert all(f".{name}'" in str(no.value) for name in READ)


def test_latent_projections_stay_float_where_the_user_says_so(
    latent: str, quantized: Quantized
) -> None:
    out = quantized("W4A16", ignore=KINDS, backend="sglang", model=latent)
    names = open_folder(str(out), Session.alone()).schemes
    assert any(".experts." in name for name in names)
    assert any(name.endswith(".self_attn.o_proj") for name in names)


def test_latent_projections_stay_float_where_they_are_few(
    latent: str, tmp_path: Path, quantized: Quantized
) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config.from_pretrained(latent, n_routed_experts=128)
    model = DeepseekV3ForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / file, tmp_path)
    out = quantized("W4A16", backend="sglang", model=str(tmp_path))
    names = open_folder(str(out), Session.alone()).schemes
    assert not any(name.endswith(READ) for name in names)
    assert any(".experts." in name for name in names)


def test_rounded_inputs_leave_a_weight_to_read(latent: str, quantized: Quantized) -> None:
    out = quantized("FP8_DYNAMIC", backend="sglang", model=latent)
    names = open_folder(str(out), Session.alone()).schemes
    assert all(any(each.endswith(f".{name}") for each in names) for name in READ)


def test_verify_finds_packed_latent_projections(latent: str, quantized: Quantized) -> None:
    folder = quantized("W4A16", backend="vllm", model=latent)
    found = {
        problem.where.rpartition(".")[2]
        for problem in qplug.verify(str(folder), backend="sglang").problems
        if "reads its weight itself" in problem.message
    }
    assert found == {*READ}


def test_packed_experts_need_silu(gelu: str, quantized: Quantized, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="with SiLU alone, not gelu_pytorch_tanh"):
        qplug.quantize(gelu, tmp_path / "q", scheme="W4A16", backend="sglang")
    out = quantized("W4A16", ignore=["*.experts.*"], backend="sglang", model=gelu)
    assert open_folder(str(out), Session.alone()).schemes


def test_experts_that_stay_float_are_named_as_they_are_merged(
    tmp_path_factory: pytest.TempPathFactory, quantized: Quantized
) -> None:
    model = str(make("afmoe", tmp_path_factory.mktemp("afmoe") / "model"))
    out = quantized("W4A16", backend="sglang", model=model)
    config = open_folder(str(out), Session.alone()).checkpoint.config["quantization_config"]
    assert r"re:.*\.mlp\.experts\.\d+\.gate_up_proj$" in config["ignore"]


def test_a_shared_expert_is_as_the_routed_ones(
    tmp_path_factory: pytest.TempPathFactory, quantized: Quantized, tmp_path: Path
) -> None:
    model = str(make("glm4_moe", tmp_path_factory.mktemp("shared") / "model"))
    words = "SGLang runs the shared expert as one more of the routed ones, which are float"
    with pytest.raises(QplugError, match=words):
        qplug.quantize(
            model, tmp_path / "q", scheme="W4A16", backend="sglang", ignore=["*.experts.*"]
        )
    both = quantized("W4A16", backend="sglang", model=model)
    assert not qplug.verify(str(both), backend="sglang").problems
    divided = quantized("W4A16", backend="vllm", model=model, ignore=["*.experts.*"])
    found = [str(problem) for problem in qplug.verify(str(divided), backend="sglang").problems]
    assert any(words in line for line in found)
