"""NaN, infinities and overflow stop a run with the tensor's name, and leave nothing behind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qplug
from qplug import Algorithm, Block, NoParams, QplugError, QuantizedWeight, hookimpl
from qplug.numerics import nearest
from qplug.registry.registry import Registry

UP = "model.layers.0.mlp.up_proj"
WriteLlama = Callable[..., Path]
Change = Callable[[Tensor], Tensor]


def put(value: float) -> Change:
    """The tensor with one of its values replaced."""

    def changed(tensor: Tensor) -> Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return changed


def times(factor: float) -> Change:
    return lambda tensor: (tensor.double() * factor).to(tensor.dtype)


def with_changed(model: Path, name: str, change: Change) -> Path:
    for shard in sorted(model.glob("*.safetensors")):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, shard, {"format": "pt"})
    return model


ALGORITHMS: dict[str, dict[str, Any]] = {
    "rtn": {"scheme": "W4A16", "group_size": 32},
    "rtn, int8": {"scheme": "W8A8"},
    "rtn, fp8": {"scheme": "FP8_DYNAMIC"},
    "rtn, nvfp4": {"scheme": "NVFP4A16"},
    "hqq": {"scheme": "W4A16_ASYM", "group_size": 32},
    "awq": {"scheme": "W4A16", "group_size": 32, "samples": 2, "seq_len": 16},
    "smoothquant": {"scheme": "W8A8", "samples": 2, "seq_len": 16},
}
FAULTS = {
    "an embedding of NaN": ("model.embed_tokens.weight", put(math.nan)),
    "a norm with infinity": ("model.layers.1.input_layernorm.weight", put(math.inf)),
    "the last norm": ("model.norm.weight", put(-math.inf)),
    "a weight of NaN": (f"{UP}.weight", put(math.nan)),
    "a weight of 1e30": (f"{UP}.weight", put(1e30)),
    "weights of 1e30": (f"{UP}.weight", times(1e32)),
    "weights near the limit": (f"{UP}.weight", put(3e38)),
    "denormal weights": (f"{UP}.weight", times(1e-38)),
}


@pytest.fixture
def model(write_llama: WriteLlama, tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama", vocab_size=4096)


def refused(model: Path, name: str, **words: Any) -> str:
    """Quantizes ``model``, which must fail with the name of a tensor; returns the message."""
    out = model.with_name("out")
    with pytest.raises(QplugError, match=f"^{re.escape(name)}") as caught:
        qplug.quantize(str(model), out, backend="compressed-tensors", **words)
    assert [path.name for path in model.parent.iterdir()] == [model.name]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_of_the_model_is_named(model: Path, fault: str, algorithm: str) -> None:
    name, change = FAULTS[fault]
    algo, words = algorithm.partition(",")[0], ALGORITHMS[algorithm]
    if words.get("samples"):
        (model / "tokenizer.json").write_bytes(_demo("tokenizer.json"))
    refused(with_changed(model, name, change), name, algo=algo, **words)


def _demo(file: str) -> bytes:
    from qplug.checkpoint.locate import find_model

    return (find_model("qplug:demo") / file).read_bytes()


@pytest.mark.parametrize("algorithm", ["rtn", "rtn, int8", "rtn, fp8", "hqq"])
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_what_overflows_float16_is_named(model: Path, name: str, algorithm: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    with_changed(model, name, put(1e6))
    algo, words = algorithm.partition(",")[0], ALGORITHMS[algorithm]
    assert "overflow float16" in refused(model, name, algo=algo, **words)


@pytest.mark.parametrize("algorithm", ["rtn", "rtn, int8", "rtn, fp8", "rtn, nvfp4", "hqq"])
@pytest.mark.parametrize("change", [times(0), times(1e-12), times(1e12)], ids=["0", "tiny", "huge"])
def test_weights_that_can_be_computed_with_are_sound(
    model: Path, change: Change, algorithm: str
) -> None:
    with_changed(model, f"{UP}.weight", change)
    (model / "tokenizer.json").write_text("{}")
    out, words = model.with_name("out"), ALGORITHMS[algorithm]
    qplug.quantize(
        str(model), out, algo=algorithm.partition(",")[0], backend="compressed-tensors", **words
    )
    assert qplug.verify(str(out)).ok


class Spoiling(Algorithm[NoParams]):
    """Rounds to nearest, and spoils what it gives."""

    name = "spoiling"
    spoil: Callable[[QuantizedWeight], Any]

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        return {linear.name: type(self).spoil(nearest(linear)) for linear in block.linears}


def scaled(value: float) -> Callable[[QuantizedWeight], QuantizedWeight]:
    def spoilt(weight: QuantizedWeight) -> QuantizedWeight:
        scale = weight.scale.clone()
        scale.view(-1)[3] = value
        return replace(weight, scale=scale)

    return spoilt


def code(value: float) -> Callable[[QuantizedWeight], QuantizedWeight]:
    def spoilt(weight: QuantizedWeight) -> QuantizedWeight:
        codes = weight.codes.float()
        codes.view(-1)[3] = value
        return replace(weight, codes=codes.to(weight.codes.dtype))

    return spoilt


SPOILT: dict[str, tuple[str, Callable[[QuantizedWeight], Any], str]] = {
    "NaN": ("W4A16", scaled(math.nan), "gave scales that are NaN"),
    "infinity": ("W4A16", scaled(math.inf), "gave scales that are NaN, infinite"),
    "zero": ("W8A8", scaled(0), "gave scales that are"),
    "negative": ("FP8_DYNAMIC", scaled(-1), "gave scales that are"),
    "not exact": ("W4A16", scaled(1.001), "gave scales that bfloat16 cannot hold"),
    "not e4m3": ("NVFP4A16", scaled(1.001e-3), "gave scales that float8_e4m3fn cannot hold"),
    "too large a code": ("W4A16", code(8), "gave codes that are no int4"),
    "too small a code": ("W4A16", code(-9), "gave codes that are no int4"),
    "asymmetric": ("W4A16_ASYM", code(16), "gave codes that are no int4"),
    "NaN code": ("FP8_DYNAMIC", code(math.nan), "gave codes that are no e4m3"),
    "off the grid": ("NVFP4A16", code(2.5), "gave codes that are no e2m1"),
    "nothing": ("W4A16", lambda weight: None, "gave NoneType"),
    "codes of int32": ("W4A16", lambda w: replace(w, codes=w.codes.int()), "codes as int32"),
    "a row less": ("W4A16", lambda w: replace(w, codes=w.codes[1:]), "gave codes as"),
    "a scale for all": ("W4A16", lambda w: replace(w, scale=w.scale[:1, :1]), "gave scales as"),
    "zeros": ("W4A16", lambda w: replace(w, zero=w.codes), "gave zero points for symmetric"),
    "no zeros": ("W4A16_ASYM", lambda w: replace(w, zero=None), "gave zero points of type"),
    "a list": ("W4A16", lambda w: replace(w, scale=[1.0]), "gave scales of type list"),
}


@pytest.mark.parametrize("kind", list(SPOILT))
def test_a_fault_of_an_algorithm_is_named(model: Path, kind: str) -> None:
    scheme, spoil, sentence = SPOILT[kind]

    class Given(Spoiling):
        """Gives what it was told to give."""

    Given.spoil = staticmethod(spoil)  # type: ignore[assignment]

    class Plugin:
        @hookimpl
        def qplug_algorithms(self) -> Iterable[type[Algorithm[Any]]]:
            return [Given]

    registry = Registry.installed().with_(Plugin(), "spoiler")
    size = {"group_size": 32} if scheme.startswith("W4") else {}
    message = refused(
        model, "model.layers.0", algo="spoiling", scheme=scheme, registry=registry, **size
    )
    assert sentence in message
    assert "spoiling of plugin spoiler" in message


def test_a_mask_of_one_number_may_overflow(model: Path) -> None:
    """Old checkpoints of float16 store the value of masked scores in float32."""
    shard = model / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(shard).items()}
    tensors["model.layers.0.self_attn.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, shard, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    out = model.with_name("out")
    assert qplug.quantize(str(model), out, group_size=32, backend="compressed-tensors").errors
