"""What qplug asks of exporters; the file as the gguf package reads it, and as llama.cpp runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
import torch
from qplug_gguf.blocks import to_bytes
from qplug_gguf.exporter import GGUF
from qplug_gguf.file import _interleaved

import qplug
from qplug.testing import ExporterContract, registry_with, write_tiny_model

SCHEMES = {"W8A16": "Q8_0", "W4A16": "Q4_0"}
REGISTRY = registry_with(GGUF)


class TestGGUF(ExporterContract):
    exporter = GGUF
    digests: ClassVar = {
        "W8A16 in groups of 32": "88f0954f5fc8ba96",
        "W4A16 in groups of 32": "e2655f16b7c55206",
    }

    def model(self, folder: Path) -> str:
        return "qplug:demo"  # that of the kit has another tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=SCHEMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / request.param
    options: dict[str, Any] = {"group_size": 32, "backend": "gguf", "registry": REGISTRY}
    return qplug.quantize("qplug:demo", out, scheme=request.param, device="cpu", **options).out


def test_one_file_holds_the_weights(folder: Path) -> None:
    assert not list(folder.glob("*.safetensors*"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == SCHEMES[folder.name]
    assert kinds["blk.3.attn_q.weight"] == SCHEMES[folder.name]
    assert kinds["token_embd.weight"] == "BF16"
    assert kinds["output_norm.weight"] == "F32"


def test_the_gguf_package_reads_the_weights_that_are_meant(folder: Path) -> None:
    weights = qplug.load(str(folder), registry=REGISTRY).state_dict()
    tensors = {t.name: t for t in gguf.GGUFReader(folder / "model.gguf").tensors}
    for theirs, ours in (
        ("blk.1.ffn_gate", "model.layers.1.mlp.gate_proj"),
        ("blk.2.attn_v", "model.layers.2.self_attn.v_proj"),
        ("blk.0.attn_norm", "model.layers.0.input_layernorm"),
        ("token_embd", "model.embed_tokens"),
    ):
        tensor = tensors[f"{theirs}.weight"]
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(read, weights[f"{ours}.weight"].numpy()), theirs
    queries = tensors["blk.0.attn_q.weight"]
    turned = _interleaved(weights["model.layers.0.self_attn.q_proj.weight"], 4)
    read = gguf.quants.dequantize(queries.data, queries.tensor_type)
    assert np.array_equal(read, turned.numpy())


def test_blocks_are_those_of_the_gguf_package() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    scale = np.abs(weight).reshape(4, 2, 32).max(-1) / 127
    codes = np.round(weight.reshape(4, 2, 32) / scale[..., None]).reshape(4, 64)
    ours = to_bytes(torch.from_numpy(codes).to(torch.int8), torch.from_numpy(scale), 8)
    assert np.array_equal(ours.numpy(), theirs)


def test_llama_cpp_says_what_qplug_says(folder: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed")
    text = "def read(path, 42):\n    return the value of 1984"
    tokens = qplug.load_tokenizer(str(folder))(text)["input_ids"]
    model = qplug.load(str(folder), registry=REGISTRY)
    with torch.no_grad():
        said = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.n_parallel, params.n_ctx, params.n_gpu_layers, params.warmup = 1, 256, 0, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": text, "n_predict": 1, "logprobs": 5})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    assert answer["usage"]["prompt_tokens"] == len(tokens)  # the same tokens, as far as one can see
    (first,) = answer["choices"][0]["logprobs"]["content"]
    for told in first["top_logprobs"]:
        # llama.cpp rounds inputs to 8 bits too.
        assert math.isclose(told["logprob"], said[told["id"]].item(), abs_tol=0.15), told
    assert first["top_logprobs"][0]["id"] == int(said.argmax())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scheme": "W8A8"}, "--group-size 32"),
        ({"scheme": "W4A16", "group_size": 64}, "--group-size 32"),
        ({"scheme": "W4A16_ASYM", "group_size": 32}, "--group-size 32"),
    ],
)
def test_what_it_cannot_store_is_refused(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(qplug.QplugError, match=sentence):
        qplug.quantize("qplug:demo", tmp_path / "out", backend="gguf", registry=REGISTRY, **options)


def test_another_tokenizer_is_refused_before_the_work(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    with pytest.raises(qplug.QplugError, match="gguf: takes byte-level BPE tokenizers"):
        qplug.quantize(str(model), tmp_path / "out", backend="gguf", registry=REGISTRY)
    (model / "tokenizer.json").unlink()
    with pytest.raises(qplug.QplugError, match=r"gguf: needs a tokenizer\.json"):
        qplug.quantize(str(model), tmp_path / "out", backend="gguf", registry=REGISTRY)


def test_a_file_that_is_not_sound_is_told(folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(folder, tmp_path / "broken")
    whole = (broken / "model.gguf").read_bytes()
    (broken / "model.gguf").write_bytes(b"NONE" + whole[4:])
    with pytest.raises(qplug.QplugError, match="not a sound GGUF file"):
        qplug.verify(str(broken), registry=REGISTRY)
