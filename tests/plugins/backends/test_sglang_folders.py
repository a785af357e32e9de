"""What SGLang 0.5.23 loads and 0.5.16 did not: two formats, NVFP4A16, scales of a cache.

Two oracles share no code with qplug: the library compressed-tensors, and a loader that was written
from compressed_tensors.py of SGLang 0.5.23, for names and for NVFP4.
"""

from __future__ import annotations

import json
import re
from shutil import copytree
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from spoilt import forget_checksums

import qplug
from qplug.machine.session import Session
from qplug.reading.folder import Folder, open_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Quantized = Callable[..., Path]

MIXED = {"*.mlp.*": "W8A8"}
#: What SGLang's Llama merges: ``packed_modules_mapping``.
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


# --- a loader by the book -------------------------------------------------------------------------


def ignored(config: dict[str, Any], layer: str) -> bool:
    """``should_ignore_layer``: a plain entry is the name, or the end of it after a dot."""

    def hit(name: str) -> bool:
        return any(
            re.match(entry[3:], name)
            if entry.startswith("re:")
            else f".{name}".endswith(f".{entry}")
            for entry in config["ignore"]
        )

    parent, _, last = layer.rpartition(".")
    if last in MERGED and layer not in config["ignore"]:
        found = {hit(f"{parent}.{part}") for part in MERGED[last]}
        assert len(found) == 1, layer
        return found.pop()
    return hit(layer)


def group_of(config: dict[str, Any], layer: str) -> dict[str, Any]:
    """``find_matched_target``: by name, then by class, then by the parts of a merged matrix."""
    targets = {
        target: group for group in config["config_groups"].values() for target in group["targets"]
    }

    def by_name(name: str) -> str | None:
        tested = (t for t in targets if re.match(t[3:] if t.startswith("re:") else f"{t}$", name))
        return next(tested, None)

    parent, _, last = layer.rpartition(".")
    parts = [by_name(f"{parent}.{part}") for part in MERGED.get(last, ())]
    merged = parts[0] if parts and all(parts) else None
    found = by_name(layer) or ("Linear" if "Linear" in targets else None) or merged
    assert found is not None, layer
    return targets[found]


def scheme_of(config: dict[str, Any], layer: str) -> str | None:
    """``get_linear_scheme`` and ``_get_scheme_from_parts``: the class that loads ``layer``."""
    if ignored(config, layer):
        return None
    group = group_of(config, layer)
    weights, inputs = group["weights"], group["input_activations"]
    layout = group.get("format") or config["format"]
    if weights["type"] == "int" and weights["strategy"] in ("group", "channel") and not inputs:
        assert layout == "pack-quantized"
        return f"WNA16 {weights['num_bits']}"
    assert layout in ("int-quantized", "float-quantized", "nvfp4-pack-quantized")
    if weights["strategy"] == "tensor_group":
        assert weights["group_size"] == 16
        return "W4A4Fp4" if inputs else "W4A16Fp4"
    assert weights["num_bits"] == inputs["num_bits"] == 8
    return "W8A8Int8" if weights["type"] == "int" else "W8A8Fp8"


def layers(block: int) -> list[str]:
    inside = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return [f"model.layers.{block}.{name}" for name in inside]


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


def quantization(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    found: dict[str, Any] = config["quantization_config"]
    return found


# --- two formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "other", "classes"),
    [
        ("W4A16", "W8A8", ["WNA16 4", "WNA16 4", "W8A8Int8", "W8A8Int8"]),
        slow("W8A16", "FP8_DYNAMIC", ["WNA16 8", "WNA16 8", "W8A8Fp8", "W8A8Fp8"]),
        slow("NVFP4A16", "W4A16", ["W4A16Fp4", "W4A16Fp4", "WNA16 4", "WNA16 4"]),
    ],
)
def test_two_formats_in_one_folder(
    quantized: Quantized, scheme: str, other: str, classes: list[str]
) -> None:
    out = quantized(scheme, backend="sglang", overrides={"*.mlp.*": other})
    config = quantization(out)
    assert config["format"] == "mixed-precision"
    for block in range(4):
        assert [scheme_of(config, layer) for layer in layers(block)] == classes
    assert scheme_of(config, "lm_head") is None
    same = quantized(scheme, backend="vllm", overrides={"*.mlp.*": other})
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (same / file).read_bytes()
    assert qplug.verify(str(out)).problems == ()
    (old, *_) = qplug.verify(str(out), engine_version="0.5.16").problems
    assert "SGLang 0.5.16" in old.message


def test_each_layer_means_to_compressed_tensors_what_it_means_to_qplug(
    quantized: Quantized,
) -> None:
    folder = open_folder(
        str(quantized("W4A16", backend="sglang", overrides=MIXED)), Session.alone()
    )
    check_by_library(folder)


def check_by_library(folder: Folder) -> None:
    told = folder.checkpoint.config["quantization_config"]
    config = QuantizationConfig.model_validate(told)
    for name in folder.schemes:
        layer = name.rpartition(".")[2]
        (group,) = (
            group
            for group in config.config_groups.values()
            if any(t == "Linear" or re.match(t[3:], name) for t in group.targets)
        )
        kind = group.format or config.format
        theirs = BaseCompressor.get_value_from_registry(str(kind)).decompress(
            stored(folder, name), group
        )["weight"]
        assert torch.equal(folder.dequantized(name).to(theirs.dtype), theirs), layer


def stored(folder: Folder, name: str) -> dict[str, Tensor]:
    return {
        tensor.removeprefix(f"{name}."): folder.checkpoint.read(tensor)
        for tensor in folder.checkpoint.tensors
        if tensor.startswith(f"{name}.")
    }


# --- NVFP4A16 -------------------------------------------------------------------------------------


def by_the_book(tensors: dict[str, Tensor]) -> Tensor:
    """``CompressedTensorsW4A16Fp4``: the global scale is a divisor, the low bits come first."""
    packed = tensors["weight_packed"]
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([magnitudes, -magnitudes])
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    scale = tensors["weight_scale"].float() * (1 / tensors["weight_global_scale"].float())
    return values[codes.int()] * scale.repeat_interleave(16, dim=1)


def test_nvfp4a16_is_loaded_by_the_book(quantized: Quantized) -> None:
    out = quantized("NVFP4A16", backend="sglang")
    assert {scheme_of(quantization(out), layer) for layer in layers(0)} == {"W4A16Fp4"}
    folder = open_folder(str(out), Session.alone())
    for name in folder.schemes:
        tensors = stored(folder, name)
        assert tensors.keys() == {"weight_packed", "weight_scale", "weight_global_scale"}
        assert torch.equal(folder.dequantized(name), by_the_book(tensors)), name
    for block in range(4):  # process_weights_after_loading refuses parts with scales of their own
        for matrix in (["self_attn.q_proj", "self_attn.k_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            scales = {
                folder.checkpoint.read(f"model.layers.{block}.{part}.weight_global_scale").item()
                for part in matrix
            }
            assert len(scales) == 1
    assert qplug.verify(str(out)).problems == ()
    check_by_library(folder)


@pytest.mark.slow
def test_nvfp4_of_other_tools_is_sound_to_the_newest(quantized: Quantized) -> None:
    out = str(quantized("NVFP4", backend="vllm"))
    assert qplug.verify(out, backend="sglang").problems == ()
    problems = qplug.verify(out, backend="sglang", engine_version="0.5.16").problems
    assert {problem.check for problem in problems} == {"format"}


# --- scales of a cache ----------------------------------------------------------------------------


def test_scales_of_a_cache_are_read(quantized: Quantized) -> None:
    out = quantized("W8A8", backend="sglang", kv_cache="fp8")
    scheme = quantization(out)["kv_cache_scheme"]
    # CompressedTensorsKVCacheMethod.is_supported_scheme
    assert (scheme["type"], scheme["num_bits"], scheme["strategy"]) == ("float", 8, "tensor")
    assert scheme["symmetric"]
    assert not scheme["dynamic"]
    names = set(load_file(out / "model.safetensors"))
    for block in range(4):  # maybe_remap_kv_scale_name puts .attn before the scale's name
        assert {f"model.layers.{block}.self_attn.{which}_scale" for which in "kv"} <= names
    assert qplug.verify(str(out)).problems == ()


@pytest.mark.slow
def test_nvfp4_has_scales_of_a_cache_too(quantized: Quantized, tmp_path: Path) -> None:
    out = quantized("NVFP4", backend="sglang", kv_cache="fp8")
    config = quantization(out)
    assert (config["quant_algo"], config["kv_cache_quant_algo"]) == ("NVFP4", "FP8")
    assert qplug.verify(str(out)).problems == ()
    scales = open_folder(str(out), Session.alone()).cache_scales()
    assert all(scale > 0 for pair in scales.values() for scale in pair)

    broken = forget_checksums(copytree(out, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_scale"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (problem,) = qplug.verify(str(broken)).problems
    assert (problem.check, problem.where) == ("missing", "model.layers.1")
