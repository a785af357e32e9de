"""Linears that a checkpoint joins, and transformers takes apart, have their names on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filled_blocks import fill_blocks
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo.make import make

import qplug
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.architectures import by_linear
from qplug.model.on_disk import as_on_disk
from qplug.model.view import model_view
from qplug.reading.load import load
from qplug.registry.registry import Registry

#: A model, a linear of a block on disk, and the linears in memory that have its rows.
JOINED = {
    "gte": ("encoder.layer.0.attention.qkv_proj", 3),
    "nomic_bert": ("encoder.layers.0.attn.Wqkv", 3),
    "molmo2": ("model.transformer.blocks.0.self_attn.att_proj", 3),
    "hrm_text": ("model.L_module.layers.0.attn.gqkv_proj", 4),
}


def _on_disk(folder: Path) -> tuple[nn.Module, dict[str, nn.Module]]:
    model = load(str(folder))
    source = by_linear(open_checkpoint(folder), Registry.installed())
    blocks = as_on_disk(model, model_view(source).blocks, source.tensors, shapes=source.shapes)
    return model, blocks


def _fill(folder: Path, blocks: dict[str, nn.Module]) -> None:
    stored = load_file(folder / "model.safetensors")
    fill_blocks(blocks, stored.__getitem__)


def _answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=torch.arange(3, 60)[None])
    answer: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return answer


@pytest.mark.parametrize("name", JOINED)
def test_a_joined_linear_computes_what_its_parts_do(tmp_path: Path, name: str) -> None:
    folder = make(name, tmp_path / name)
    model, blocks = _on_disk(folder)
    _fill(folder, blocks)
    expected, found = _answer(load(str(folder))), _answer(model)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", JOINED)
def test_a_joined_linear_is_called_once_in_a_pass(tmp_path: Path, name: str) -> None:
    folder = make(name, tmp_path / name)
    model, blocks = _on_disk(folder)
    _fill(folder, blocks)
    linear, _ = JOINED[name]
    block = next(each for each in blocks if linear.startswith(f"{each}."))
    joined = blocks[block].get_submodule(linear.removeprefix(f"{block}."))
    calls: list[Tensor] = []
    passes: list[Tensor] = []
    joined.register_forward_hook(lambda module, inputs, output: calls.append(output))
    blocks[block].register_forward_hook(lambda module, inputs, output: passes.append(inputs[0]))
    first = _answer(model)
    assert len(calls) == len(passes) >= 1
    with torch.no_grad():
        joined.get_parameter("weight").mul_(2)
    second = _answer(model)
    assert len(calls) == len(passes)
    assert not torch.equal(first, second)  # it does not go by what it returned before


@pytest.mark.parametrize("name", ["gte", "molmo2"])
def test_scale_moves_into_the_first_half_of_up_and_gate(tmp_path: Path, name: str) -> None:
    folder = make(name, tmp_path / name)
    source = open_checkpoint(folder)
    view = model_view(source)
    schemes = dict.fromkeys(view.quantizable, qplug.preset("W4A16"))
    samples = Samples(torch.arange(3, 67)[None])
    walk = Walk(source, view, schemes, samples, Session(Registry([])), propagate="float")
    block = walk.gather(view.blocks[0])
    group = block.groups[-1]
    producer, readers = block.producer_and_readers(group)
    assert readers in {("mlp.down_proj",), ("mlp.ff_out",)}
    assert producer.module in {"mlp.up_gate_proj", "mlp.ff_proj"}
    assert torch.equal(producer.rows, torch.arange(512))
    walk.close()


@pytest.mark.parametrize("name", ["gte", "nomic_bert"])
def test_gptq_takes_joined_linears(tmp_path: Path, name: str) -> None:
    folder = make(name, tmp_path / name)
    errors = {
        algo: qplug.quantize(
            str(folder),
            tmp_path / algo,
            algo=algo,
            scheme="W4A16",
            backend="vllm",
            dataset="demo",
            samples=8,
            seq_len=64,
        ).errors
        for algo in ("gptq", "rtn")
    }
    linear, _ = JOINED[name]
    assert linear in errors["gptq"]
    assert qplug.verify(str(tmp_path / "gptq")).ok
