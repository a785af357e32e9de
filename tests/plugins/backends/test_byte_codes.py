"""Codes in bytes, ``int-quantized`` and ``naive-quantized`` as llm-compressor stores them.

compressed-tensors makes the folders, and is the reference reader.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

import qplug
from qplug import QplugError
from qplug.checkpoint.locate import find_model
from qplug.machine.session import Session
from qplug.reading.folder import open_folder
from qplug_compressed_tensors.configuration import Configuration, stores
from qplug_compressed_tensors.format import CompressedTensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

COMPRESSOR = BaseCompressor.get_value_from_registry("int-quantized")
UP = "model.layers.0.mlp.up_proj"


def compressed(weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """The tensors of a ``weight`` [out, in] that compressed-tensors stores for ``scheme``."""
    out, width = weight.shape
    groups = weight.float().view(out, -1, scheme.weights.group_size or width)
    state = {"weight": weight, "weight_scale": (groups.abs().amax(2) / 7.5).to(weight.dtype)}
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, groups.shape[:2], dtype=torch.int8)
    made: dict[str, Tensor] = COMPRESSOR.compress(state, scheme)
    return made


def stored_by_others(folder: Path, scheme: str, *, in_group: bool = False) -> dict[str, Tensor]:
    """Writes the demo model to ``folder`` in ``scheme``; returns the weights that it stands for.

    ``in_group``: whether the config group names the format, and the folder names none.
    """
    demo, parts = find_model("qplug:demo"), preset_name_to_scheme(scheme, ["Linear"])
    shutil.copytree(demo, folder)
    tensors, floats = {}, {}
    for name, value in load_file(demo / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            made = compressed(value, parts)
            floats[module] = COMPRESSOR.decompress(made, parts)["weight"]
            tensors |= {f"{module}.{local}": tensor for local, tensor in made.items()}
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    group = parts.model_dump(mode="json", exclude={"format"})
    quantization: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (group if in_group else quantization)["format"] = "int-quantized"
    rewrite(folder, quantization)
    return floats


def rewrite(folder: Path, quantization: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("scheme", ["W4A8", "W4AFP8"])
@pytest.mark.parametrize("in_group", [False, True])
def test_a_folder_is_read_and_verified(tmp_path: Path, scheme: str, in_group: bool) -> None:
    wanted = stored_by_others(tmp_path / "in", scheme, in_group=in_group)
    found = qplug.verify(str(tmp_path / "in"))
    assert (found.problems, found.linears) == ((), 28)
    folder = open_folder(str(tmp_path / "in"), Session.alone())
    assert {each.name for each in folder.schemes.values()} == {scheme}
    for name, weight in wanted.items():
        assert torch.equal(folder.parameter(f"{name}.weight").to(weight.dtype), weight), name


def test_vllm_does_not_run_it_until_codes_are_packed(tmp_path: Path) -> None:
    wanted = stored_by_others(tmp_path / "in", "W4A8")
    said = qplug.verify(str(tmp_path / "in"), backend="vllm").problems
    assert {problem.check for problem in said} >= {"format"}
    assert "does not run W4A8 in int-quantized" in str(said[0])
    out = qplug.convert(str(tmp_path / "in"), tmp_path / "out", backend="vllm").out
    folder = open_folder(str(out), Session.alone())
    assert {each.name for each in folder.schemes.values()} == {"W4A8"}
    assert f"{UP}.weight_packed" in folder.checkpoint.tensors
    for name, weight in wanted.items():
        assert torch.equal(folder.dequantized(name).to(weight.dtype), weight), name


def test_codes_are_where_the_format_says(tmp_path: Path) -> None:
    stored_by_others(tmp_path / "in", "W4A8")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    rewrite(tmp_path / "in", config["quantization_config"] | {"format": "pack-quantized"})
    said = {
        (problem.check, problem.message)
        for problem in qplug.verify(str(tmp_path / "in")).problems
        if problem.where == UP
    }
    assert said == {
        ("missing", "there is no weight_packed"),
        ("missing", "there is no weight_shape"),
        ("unexpected", "weight does not belong to W4A8"),
    }


def test_zero_points_in_bytes() -> None:
    theirs = preset_name_to_scheme("W4A8", ["Linear"])
    theirs.weights.symmetric = False
    made = compressed(torch.randn(16, 256), theirs)
    group = theirs.model_dump(mode="json") | {"format": "int-quantized"}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    ours = Configuration.parse(config).groups[0].scheme
    weight = CompressedTensors().dequantize(made, ours)
    assert torch.equal(weight, COMPRESSOR.decompress(made, theirs)["weight"])


def test_codes_of_more_bits_are_refused() -> None:
    made = compressed(torch.randn(16, 256), preset_name_to_scheme("W4A8", ["Linear"]))
    made["weight"][3, 5] = 8
    with pytest.raises(QplugError, match="weight has integers from -8 to 8, which are not int4"):
        CompressedTensors().unpack(made, qplug.preset("W4A8"))


#: Schemes that compressed-tensors itself stores as naive-quantized: they fit no other format.
NAIVE = {
    "fp8 per row": QuantizationArgs(num_bits=8, type="float", strategy="channel"),
    "fp8 per tensor": QuantizationArgs(num_bits=8, type="float", strategy="tensor"),
    "fp8 blocks": QuantizationArgs(
        num_bits=8, type="float", strategy="block", block_structure=[128, 128]
    ),
}
#: Integers that it would pack, and stores so if it is told to.
FORCED = {
    "int4 per tensor": QuantizationArgs(num_bits=4, strategy="tensor"),
    "int4 groups": QuantizationArgs(num_bits=4, strategy="group", group_size=128),
    "int3 per row, zero points": QuantizationArgs(num_bits=3, strategy="channel", symmetric=False),
    "int8 per row": QuantizationArgs(num_bits=8, strategy="channel"),
}


def naive_folder(folder: Path, weights: QuantizationArgs) -> dict[str, Tensor]:
    """Writes the demo model with naive-quantized ``weights``; returns what they stand for."""
    naive = BaseCompressor.get_value_from_registry("naive-quantized")
    demo, scheme = find_model("qplug:demo"), QuantizationScheme(targets=["Linear"], weights=weights)
    shutil.copytree(demo, folder)
    tensors, floats = {}, {}
    for name, value in load_file(demo / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = value
            continue
        state = {"weight": value} | parameters(value, weights)
        made = naive.compress(state, scheme)
        floats[module] = naive.decompress(made, scheme)["weight"]
        tensors |= {f"{module}.{local}": tensor for local, tensor in made.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "format": "naive-quantized",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    rewrite(folder, quantization)
    return floats


def parameters(weight: Tensor, args: QuantizationArgs) -> dict[str, Tensor]:
    """The scales, and zero points if ``args`` has them, of ``weight`` [out, in]."""
    (out, width), values = weight.shape, weight.float()
    if args.strategy == "tensor":
        low, high = (bound.reshape(1) for bound in values.aminmax())
    elif args.strategy == "block":
        tiles = values.view(out // 128, 128, width // 128, 128).transpose(1, 2).flatten(2)
        low, high = tiles.amin(2), tiles.amax(2)
    else:
        groups = values.view(out, -1, args.group_size or width)
        low, high = groups.amin(2), groups.amax(2)
    scale, zero = calculate_qparams(low, high, args)
    found = {"weight_scale": scale}
    return found if args.symmetric else found | {"weight_zero_point": zero}


@pytest.mark.parametrize("weights", [*NAIVE.values(), *FORCED.values()], ids=[*NAIVE, *FORCED])
def test_naive_quantized_is_read_and_verified(tmp_path: Path, weights: QuantizationArgs) -> None:
    wanted = naive_folder(tmp_path / "in", weights)
    found = qplug.verify(str(tmp_path / "in"))
    assert (found.problems, found.linears) == ((), 28)
    folder = open_folder(str(tmp_path / "in"), Session.alone())
    for name, weight in wanted.items():
        assert torch.equal(folder.parameter(f"{name}.weight").to(weight.dtype), weight), name
        assert torch.equal(folder.dequantized(name).to(weight.dtype), weight), name


@pytest.mark.parametrize("weights", NAIVE.values(), ids=NAIVE)
def test_such_weights_are_naive_to_the_library(weights: QuantizationArgs) -> None:
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    assert infer_module_format(torch.nn.Linear, scheme).value == "naive-quantized"


UNSERVED_BLOCKS = {
    "sglang": "SGLang has fp8 weights with float inputs by row or tensor alone: use FP8A16",
    "vllm": "vLLM stops at an assertion that only rounded inputs satisfy: use FP8A16",
}


@pytest.mark.parametrize("layout", ["naive-quantized", "float-quantized"])
@pytest.mark.parametrize(
    ("kind", "name"),
    list(zip(NAIVE, ("FP8A16", "FP8A16_TENSOR", "FP8A16_BLOCK"), strict=True)),
)
def test_fp8_of_others_with_float_inputs_is_served(
    tmp_path: Path, kind: str, name: str, layout: str
) -> None:
    wanted = naive_folder(tmp_path / "in", NAIVE[kind])
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    rewrite(tmp_path / "in", config["quantization_config"] | {"format": layout})
    folder = open_folder(str(tmp_path / "in"), Session.alone())
    assert {each.name for each in folder.schemes.values()} == {name}
    for linear, weight in wanted.items():
        assert torch.equal(folder.dequantized(linear).to(weight.dtype), weight), linear
    for backend, why in UNSERVED_BLOCKS.items():
        problems = qplug.verify(str(tmp_path / "in"), backend=backend).problems
        assert {each.message for each in problems} == ({why} if name == "FP8A16_BLOCK" else set())


def test_engines_run_naive_integers_once_they_are_packed(tmp_path: Path) -> None:
    wanted = naive_folder(tmp_path / "in", FORCED["int4 groups"])
    for backend in ("vllm", "sglang"):
        said = qplug.verify(str(tmp_path / "in"), backend=backend).problems
        assert any("does not run W4A16 in naive-quantized" in str(each) for each in said)
        out = qplug.convert(str(tmp_path / "in"), tmp_path / backend, backend=backend).out
        assert qplug.verify(str(out)).ok
        folder = open_folder(str(out), Session.alone())
        assert f"{UP}.weight_packed" in folder.checkpoint.tensors
        for name, weight in wanted.items():
            assert torch.equal(folder.dequantized(name).to(weight.dtype), weight), name


def test_other_floats_are_no_naive_weights() -> None:
    assert not stores("naive-quantized", qplug.preset("NVFP4A16"))
    assert not stores("naive-quantized", qplug.preset("MXFP8"))
    assert not stores("float-quantized", qplug.preset("WE4M3A16"))
    assert stores("naive-quantized", qplug.preset("FP8"))
    assert stores("naive-quantized", qplug.preset("W8A8"))
