"""Layers that route some tokens past their last expert, where they come out as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo.make import make

import qplug
from qplug.checkpoint.open import open_checkpoint
from qplug.model.experts import Experts
from qplug.model.on_disk import as_on_disk
from qplug.model.view import model_view
from qplug.reading.load import load

#: Linears of the experts that transformers has, but does not compute.
IDLE = re.compile(r"\.experts\.[45]\.(gate|up)_proj\.weight$")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("longcat_flash", tmp_path_factory.mktemp("idle") / "longcat_flash")


def test_tokens_come_out_as_they_are(folder: Path) -> None:
    whole, apart = load(str(folder)), load(str(folder))
    source = open_checkpoint(folder)
    blocks = as_on_disk(apart, model_view(source).blocks, source.tensors)
    layers = [part for part in apart.modules() if isinstance(part, Experts)]
    assert layers
    past: list[bool] = []
    for layer in layers:
        layer.on_given = lambda given: past.append(bool((given.expert >= 4).any()))
    names = [
        f"{block}.{n}" for block, module in blocks.items() for n, _ in module.named_parameters()
    ]
    assert not any(IDLE.search(name) for name in names)
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, found = (each(input_ids=tokens).logits for each in (whole, apart))
    assert any(past)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("algo", ["rtn", "gptq"])
def test_a_checkpoint_need_not_have_weights_of_experts_that_do_not_compute(
    folder: Path, tmp_path: Path, algo: str
) -> None:
    published = tmp_path / "published"
    published.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (published / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not IDLE.search(name)}
    assert len(kept) == len(tensors) - 2 * 2 * 2  # layers, experts, linears
    save_file(kept, published / "model.safetensors", metadata={"format": "pt"})
    result = qplug.quantize(
        str(published),
        tmp_path / "out",
        algo=algo,
        scheme="W4A16",
        backend="vllm",
        dataset="demo",
        samples=4,
        seq_len=32,
    )
    assert "model.layers.0.mlp.experts.3.down_proj" in result.errors
    assert qplug.verify(str(tmp_path / "out")).ok


def test_an_expert_without_one_of_its_weights_is_missed(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        qplug.QplugError, match=r"lacks model.layers.0.mlp.experts.3.up_proj.weight"
    ):
        model_view(open_checkpoint(tmp_path))
