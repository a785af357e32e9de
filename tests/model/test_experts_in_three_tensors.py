"""Experts whose gate, up and down are a tensor of three axes each, which transformers joins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from filled_blocks import fill_blocks
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo.make import make

import qplug
from qplug.checkpoint.open import open_checkpoint
from qplug.model.architectures import by_linear
from qplug.model.on_disk import as_on_disk
from qplug.model.view import model_view
from qplug.reading.load import load
from qplug.registry.registry import Registry

LAYER = "model.layers.1.moe"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make("step3p7", tmp_path_factory.mktemp("three") / "step3p7")
    config = json.loads((made / "config.json").read_text("utf-8"))
    config["text_config"]["sliding_window"] = 16  # published models have one
    (made / "config.json").write_text(json.dumps(config), "utf-8")
    return made


def _answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(input_ids=torch.arange(3, 60)[None]).logits
    return answer


def test_each_expert_has_its_part_of_each_tensor(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    apart = by_linear(open_checkpoint(folder), Registry.installed())
    view = model_view(apart)
    for linear in ("gate_proj", "up_proj", "down_proj"):
        assert f"{LAYER}.{linear}.weight" not in apart.tensors
        for number, weight in enumerate(stored[f"{LAYER}.{linear}.weight"]):
            name = f"{LAYER}.experts.{number}.{linear}"
            assert torch.equal(apart.read(f"{name}.weight"), weight)
            assert view.linears[name] == tuple(weight.shape)
            assert name in view.quantizable


@pytest.mark.parametrize("apart", [True, False])
def test_the_model_computes_the_same(folder: Path, apart: bool) -> None:
    whole, renamed = load(str(folder)), load(str(folder))
    source = open_checkpoint(folder)
    linears = by_linear(source, Registry.installed())
    tensors = linears if apart else source
    blocks = as_on_disk(renamed, model_view(linears).blocks, tensors.tensors, shapes=tensors.shapes)
    fill_blocks(blocks, tensors.read)
    expected = _answer(whole)
    assert (_answer(renamed) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("algo", ["rtn", "gptq"])
def test_they_are_quantized_one_by_one(folder: Path, tmp_path: Path, algo: str) -> None:
    result = qplug.quantize(
        str(folder),
        tmp_path / "out",
        algo=algo,
        scheme="W4A16",
        backend="vllm",
        dataset="demo",
        samples=4,
        seq_len=32,
    )
    assert f"{LAYER}.experts.3.up_proj" in result.errors
    assert result.float_share < 0.01
    assert qplug.verify(str(tmp_path / "out")).ok
    expected = _answer(load(str(folder)))
    assert 0 < (_answer(load(str(tmp_path / "out"))) - expected).norm() < expected.norm()


def test_an_engine_that_reads_them_together_refuses_them(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(qplug.QplugError, match=r"SGLang .* loads the experts .* --backend vllm"):
        qplug.quantize(str(folder), tmp_path / "out", algo="rtn", scheme="W4A16", backend="sglang")
    qplug.quantize(
        str(folder),
        tmp_path / "out",
        algo="rtn",
        scheme="W4A16",
        backend="sglang",
        ignore=("*.experts.*",),
    )
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    for linear in ("gate_proj", "up_proj", "down_proj"):
        name = f"{LAYER}.{linear}.weight"
        assert torch.equal(before[name], after[name])
