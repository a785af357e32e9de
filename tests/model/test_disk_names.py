"""Models whose names in memory are not those on disk are quantized under their names on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from odd_models import OddModel

import qplug
from qplug.checkpoint.open import open_checkpoint
from qplug.model.view import model_view

BLOCKS = {
    "gemma3": "language_model.model.layers.0",
    "nemotron_h": "backbone.layers.0",
    "hy_v3": "model.layers.0",
}


@pytest.mark.parametrize("name", list(BLOCKS))
def test_linears_and_blocks_have_the_names_on_disk(odd_model: OddModel, name: str) -> None:
    source = open_checkpoint(odd_model(name))
    view = model_view(source)
    assert view.blocks[0] == BLOCKS[name]
    assert view.quantizable
    assert {f"{linear}.weight" for linear in view.linears} <= source.tensors.keys()


@pytest.mark.parametrize("name", list(BLOCKS))
def test_the_folder_is_sound(odd_model: OddModel, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    qplug.quantize(str(odd_model(name)), out, scheme="W8A16", group_size=32, backend="vllm")
    verified = qplug.verify(str(out))
    assert verified.ok, verified.problems
    assert verified.float_share < 0.1


@pytest.mark.parametrize("name", list(BLOCKS))
def test_calibration_finds_the_blocks(odd_model: OddModel, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    result = qplug.quantize(
        str(odd_model(name)),
        out,
        algo="gptq",
        scheme="W8A16",
        group_size=32,
        backend="vllm",
        samples=2,
        seq_len=16,
    )
    assert result.losses.keys() == result.errors.keys()
    assert qplug.verify(str(out)).ok
