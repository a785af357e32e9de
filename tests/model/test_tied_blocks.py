"""A model whose encoder computes with the weights of its decoder's blocks (DiffusionGemma)."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo.make import make

import qplug


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("diffusion_gemma", tmp_path_factory.mktemp("tied") / "diffusion_gemma")


def test_its_experts_go_by_the_name_that_the_checkpoint_has(folder: Path, tmp_path: Path) -> None:
    result = qplug.quantize(
        str(folder), tmp_path / "out", algo="rtn", scheme="W4A16", backend="vllm"
    )
    assert "model.decoder.layers.1.experts.3.up_proj" in result.errors
    assert result.float_share < 0.01
    assert qplug.verify(str(tmp_path / "out")).ok


def test_calibration_says_why_it_cannot_follow(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(qplug.QplugError, match=r"encoder.*outside of its blocks, too.*such as rtn"):
        qplug.quantize(
            str(folder),
            tmp_path / "out",
            algo="gptq",
            scheme="W4A16",
            backend="vllm",
            samples=2,
            seq_len=16,
        )
