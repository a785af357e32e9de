"""gpt-oss in its own MXFP4 layout, which transformers reads too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from zoo.make import make

import qplug
from qplug import QplugError
from qplug.reading.load import load


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("gpt_oss", tmp_path_factory.mktemp("gpt_oss") / "model")


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_transformers_reads_the_same_model(gpt_oss: Path, tmp_path: Path, algorithm: str) -> None:
    out = tmp_path / "out"
    qplug.quantize(
        str(gpt_oss),
        out,
        algo=algorithm,
        scheme="MXFP4A16",
        backend="gpt-oss",
        samples=2,
        seq_len=16,
    )
    assert qplug.verify(str(out)).ok
    tokens = torch.arange(3, 60)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.float32,
    ).eval()
    with torch.no_grad():
        expected, found = theirs(input_ids=tokens).logits, load(str(out))(input_ids=tokens).logits
        floats = load(str(gpt_oss))(input_ids=tokens).logits
    assert torch.equal(expected, found)
    assert 0 < (found - floats).norm() < 0.5 * floats.norm()


def test_the_folder_looks_as_published(gpt_oss: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qplug.quantize(str(gpt_oss), out, scheme="MXFP4A16", backend="gpt-oss")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"
    assert "model.layers.*.self_attn" in config["modules_to_not_convert"]
    tensors = load_file(out / "model.safetensors")
    experts = "model.layers.0.mlp.experts."
    count, rows, groups, size = tensors[f"{experts}gate_up_proj_blocks"].shape
    assert (size, tensors[f"{experts}gate_up_proj_blocks"].dtype) == (16, torch.uint8)
    assert tensors[f"{experts}gate_up_proj_scales"].shape == (count, rows, groups)
    assert tensors[f"{experts}gate_up_proj_bias"].shape == (count, rows)


def test_a_killed_run_goes_on_with_the_same_bytes(gpt_oss: Path, tmp_path: Path) -> None:
    words = {
        "algo": "gptq",
        "scheme": "MXFP4A16",
        "backend": "gpt-oss",
        "samples": 2,
        "seq_len": 16,
    }
    qplug.quantize(str(gpt_oss), tmp_path / "whole", **words)

    class StopError(Exception):
        pass

    def stop(number: int, *_: object) -> None:
        raise StopError

    with pytest.raises(StopError):
        qplug.quantize(str(gpt_oss), tmp_path / "cut", **words, watch=stop)
    result = qplug.quantize(str(gpt_oss), tmp_path / "cut", **words)
    assert result.resumed
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert one == two


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_other_backends_say_what_to_take(gpt_oss: Path, tmp_path: Path, backend: str) -> None:
    with pytest.raises(QplugError, match="--backend gpt-oss --scheme MXFP4A16"):
        qplug.quantize(str(gpt_oss), tmp_path / "out", scheme="FP8_DYNAMIC", backend=backend)


def test_other_models_and_schemes_are_refused(gpt_oss: Path, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="stores only MXFP4A16"):
        qplug.quantize(str(gpt_oss), tmp_path / "out", scheme="W4A16", backend="gpt-oss")
    with pytest.raises(QplugError, match="experts alone"):
        qplug.quantize("qplug:demo", tmp_path / "out", scheme="MXFP4A16", backend="gpt-oss")
