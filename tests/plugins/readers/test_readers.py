"""Quantized checkpoints read as float, compared with the code of others and with plain loops."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from foreign_folders import pack, pack_awq, pack_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from qplug import Checkpoint, CodedTensor, QplugError, Registry, open_checkpoint
from qplug.numerics import dequantize

SOURCES = Registry.installed().sources
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
few = settings(max_examples=8, deadline=None)


def opened(quantization: dict[str, Any], tensors: dict[str, Tensor], **config: Any) -> Checkpoint:
    """The checkpoint of ``tensors``, read as float; its files lie in a new temporary folder."""
    folder = Path(tempfile.mkdtemp())
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    text = {"dtype": "bfloat16", "quantization_config": quantization, **config}
    (folder / "config.json").write_text(json.dumps(text))
    return open_checkpoint(folder, readers=SOURCES)


def only(quantization: dict[str, Any], tensors: dict[str, Tensor], **config: Any) -> Tensor:
    """The single float tensor that ``tensors`` stand for."""
    checkpoint = opened(quantization, tensors, **config)
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.quantized
    ((name, stored),) = checkpoint.tensors.items()
    value = stored.read()
    assert (tuple(value.shape), str(value.dtype)) == (stored.spec.shape, "torch.bfloat16"), name
    assert b"".join(stored.chunks()) == value.view(torch.uint8).numpy().tobytes()
    middle = slice(0, max(1, len(value) // 2))
    assert torch.equal(stored.read_rows(middle), value[middle])
    if isinstance(stored, CodedTensor):
        assert torch.equal(dequantize(stored.codes()).bfloat16(), value)
    return value


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.05


def float8(*shape: int) -> Tensor:
    return (torch.randn(*shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.01 + 1e-4


def powers(*shape: int) -> Tensor:
    return torch.randint(110, 130, shape, dtype=torch.uint8)


def codes(bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 2**bits, shape)


# --- fp8, DeepSeek-V4's fp4 ----------------------------------------------------------------------


def as_transformers(codes: Tensor, scales: Tensor) -> Tensor:
    convert = Fp8Dequantize(None)._dequantize_one
    return convert(codes, scales, torch.bfloat16)


@few
@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_fp8_in_blocks(tall: int, wide: int, stacked: bool) -> None:
    experts = (3,) if stacked else ()
    weight, scales = float8(*experts, 16 * tall, 32 * wide), positive(*experts, tall, wide)
    told = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}
    name = "a.experts.gate_up_proj" if stacked else "a.q_proj.weight"
    read = only(told, {name: weight, f"{name}_scale_inv": scales})
    assert torch.equal(read, as_transformers(weight, scales))


@pytest.mark.parametrize("local", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (24, 1), (24,)])
def test_fp8_with_a_scale_for_the_tensor_or_a_row(local: str, shape: tuple[int, ...]) -> None:
    weight, scale = float8(24, 40), positive(*shape)
    tensors = {"q.weight": weight, f"q.{local}": scale, "q.activation_scale": positive(1)}
    told = {"quant_method": "fp8", "activation_scheme": "static"}
    rows = scale.reshape(-1, 1)
    assert torch.equal(only(told, tensors), (weight.float() * rows).bfloat16())


def test_fbgemm_with_stacked_experts() -> None:
    """Llama 4 in fp8: experts ``[E, H, 2I]`` with a scale for each output."""
    weight, scale = float8(3, 16, 24), positive(3, 1, 24)
    tensors = {"e.gate_up_proj": weight, "e.gate_up_proj_scale": scale}
    read = only({"quant_method": "fbgemm_fp8"}, tensors)
    assert torch.equal(read, (weight.float() * scale).bfloat16())


@few
@given(st.integers(1, 3), st.integers(1, 3))
def test_deepseek_v4(tall: int, wide: int) -> None:
    told = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
    }
    e8m0 = torch.float8_e8m0fnu
    dense, scale = float8(128 * tall, 128 * wide), powers(tall, wide).view(e8m0)
    packed = torch.randint(-128, 128, (8 * tall, 32 * wide), dtype=torch.int8)
    exponents = powers(8 * tall, 2 * wide).view(e8m0)
    checkpoint = opened(
        told,
        {
            "layers.0.attn.wq_a.weight": dense,
            "layers.0.attn.wq_a.scale": scale,
            "layers.0.ffn.experts.0.w1.weight": packed,
            "layers.0.ffn.experts.0.w1.scale": exponents,
            "layers.0.hc_attn_scale": positive(3),
        },
        expert_dtype="fp4",
    )
    assert checkpoint.quantized == "fp8 in blocks of 128 x 128, experts in fp4"
    wq, w1 = "layers.0.attn.wq_a.weight", "layers.0.ffn.experts.0.w1.weight"
    assert set(checkpoint.tensors) == {wq, w1, "layers.0.hc_attn_scale"}
    assert torch.equal(checkpoint.read(wq), as_transformers(dense, scale))
    assert torch.equal(checkpoint.read(w1), as_transformers(packed, exponents))


# --- gpt-oss -------------------------------------------------------------------------------------


@few
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3))
def test_mxfp4_of_gpt_oss(experts: int, rows: int, groups: int) -> None:
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8)
    scales = powers(experts, rows, groups)
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales}
    read = only({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, tensors)
    assert torch.equal(read, _convert_moe_packed_tensors(blocks, scales))


# --- compressed-tensors --------------------------------------------------------------------------


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4 asym": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int8": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 asym": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    **{
        f"int{bits}{'' if symmetric else ' asym'}": (
            "pack-quantized",
            {
                "num_bits": bits,
                "strategy": "group",
                "group_size": 32,
                "symmetric": symmetric,
            },
        )
        for bits, symmetric in ((2, True), (3, False), (5, True), (6, False), (7, True))
    },
    "W8A8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "W4A8": ("int-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "W4A8 asym": ("int-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    "fp8 row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "torch.uint8",
        },
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {
            "num_bits": 8,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "torch.uint8",
        },
    ),
}


def compressed(case: str, out: int, width: int) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """What compressed-tensors stores for a random weight, and what it reads of that."""
    layout, told = CASES[case]
    args = QuantizationArgs(**told)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    grid = {
        "tensor": (1,),
        "channel": (out, 1),
        "block": (-(-out // 16), -(-width // 32)),
    }.get(told["strategy"], (out, width // told.get("group_size", width)))
    scale = torch.rand(grid) * 0.02 + 0.005
    state = {"weight": torch.randn(out, width) * 0.1, "weight_scale": scale.bfloat16().float()}
    if told.get("symmetric") is False:
        low = -(2 ** (told["num_bits"] - 1))
        state["weight_zero_point"] = torch.randint(low, -low, grid, dtype=torch.int8)
    if case == "nvfp4":
        state["weight_scale"] = (torch.rand(grid) * 300 + 1).to(torch.float8_e4m3fn).float()
        state["weight_global_scale"] = torch.tensor([731.5])
    if case.startswith("mxfp"):
        state["weight_scale"] = torch.exp2(torch.randint(-9, -4, grid).float())
    compressor = BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    floats = compressor.decompress(packed, scheme)["weight"]
    inputs = None
    if layout in ("int-quantized", "float-quantized"):
        kind = told.get("type", "int")
        inputs = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": told, "input_activations": inputs}
        },
    }
    stored = {f"m.q.{name}": value for name, value in packed.items() if value is not None}
    return quantization, stored, floats


@pytest.mark.parametrize("case", CASES)
@few
@given(st.integers(1, 20), st.integers(1, 3))
def test_compressed_tensors(case: str, rows: int, groups: int) -> None:
    quantization, stored, floats = compressed(case, 8 * rows, 32 * groups)
    assert torch.equal(only(quantization, stored), floats.bfloat16())


def test_kimi_has_its_quantization_within_the_text_model() -> None:
    quantization, stored, floats = compressed("int4", 16, 64)
    names = {
        f"layers.0.mlp.experts.{n}.up_proj.{name.removeprefix('m.q.')}": value.clone()
        for n in range(2)
        for name, value in stored.items()
    }
    text = {"quantization_config": quantization, "dtype": "bfloat16"}
    folder = Path(tempfile.mkdtemp())
    save_file(names, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"text_config": text}))
    checkpoint = open_checkpoint(folder, readers=SOURCES)
    assert checkpoint.config == {"text_config": {"dtype": "bfloat16"}}
    assert set(checkpoint.tensors) == {f"layers.0.mlp.experts.{n}.up_proj.weight" for n in range(2)}
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), floats.bfloat16())


# --- GPTQ and AWQ, by the book -------------------------------------------------------------------


@few
@given(
    st.sampled_from([4, 8]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["gptq", "gptq_v2"]),
    st.integers(1, 3),
)
def test_gptq(bits: int, sym: bool, reordered: bool, version: str, groups: int) -> None:
    size, out = 32, 24
    width = size * groups
    weight, zero = codes(bits, out, width), 1 + codes(bits, out, groups) % (2**bits - 1)
    if sym:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    scale = positive(out, groups).half()
    order = torch.arange(width) // size
    if reordered:
        order = order[torch.randperm(width)]
    stored_zero = zero if version == "gptq_v2" else zero - 1
    tensors = {
        "q.qweight": pack_rows(weight.T, bits),
        "q.qzeros": pack(stored_zero.T, bits),
        "q.scales": scale.T,
        "q.g_idx": order.int(),
        "q.bias": random(out).bfloat16(),
    }
    told = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "sym": sym,
        "desc_act": reordered,
        "checkpoint_format": version,
    }
    checkpoint = opened(told, tensors)
    assert set(checkpoint.tensors) == {"q.weight", "q.bias"}
    expected = torch.empty(out, width)
    for column in range(width):
        group = int(order[column])
        expected[:, column] = (weight[:, column] - zero[:, group]).float() * scale[:, group].float()
    assert torch.equal(checkpoint.read("q.weight"), expected.bfloat16())
    stored = checkpoint.tensors["q.weight"]
    assert isinstance(stored, CodedTensor)
    if torch.equal(order, torch.arange(width) // size):
        assert torch.equal(dequantize(stored.codes()), expected)
    else:
        with pytest.raises(QplugError, match="reordered"):
            stored.codes()


@few
@given(st.integers(1, 4), st.integers(1, 3))
def test_awq(words: int, groups: int) -> None:
    size, out = 32, 8 * words
    width = size * groups
    weight, zero, scale = codes(4, width, out), codes(4, groups, out), positive(groups, out).half()
    tensors = {"q.qweight": pack_awq(weight), "q.qzeros": pack_awq(zero), "q.scales": scale}
    told = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    rows = torch.arange(width) // size
    expected = (weight - zero[rows]).float() * scale[rows].float()
    assert torch.equal(only(told, tensors), expected.T.bfloat16())


# --- ModelOpt ------------------------------------------------------------------------------------


def test_modelopt_nvfp4_by_the_book() -> None:
    packed = torch.randint(0, 256, (6, 16), dtype=torch.uint8)
    scale, unit = (torch.rand(6, 2) * 300 + 1).to(torch.float8_e4m3fn), torch.tensor(0.0017)
    expected = torch.empty(6, 32)
    for row in range(6):
        for column in range(32):
            byte = int(packed[row, column // 2])
            nibble = byte >> 4 if column % 2 else byte & 15
            value = E2M1[nibble & 7] * (-1 if nibble & 8 else 1)
            expected[row, column] = value * (scale[row, column // 16].float() * unit)
    tensors = {
        "m.q_proj.weight": packed,
        "m.q_proj.weight_scale": scale,
        "m.q_proj.weight_scale_2": unit,
        "m.q_proj.input_scale": torch.tensor(0.5),
        "m.k_proj.k_scale": torch.tensor(1.0),
    }
    told = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    assert torch.equal(only(told, tensors), expected.bfloat16())


def test_modelopt_says_so_in_a_file_of_its_own() -> None:
    weight, scale = float8(16, 32), torch.tensor(0.01)
    folder = Path(tempfile.mkdtemp())
    save_file({"q.weight": weight, "q.weight_scale": scale}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(told))
    checkpoint = open_checkpoint(folder, readers=SOURCES)
    assert checkpoint.quantized == "modelopt FP8"
    assert torch.equal(checkpoint.read("q.weight"), (weight.float() * 0.01).bfloat16())
    assert checkpoint.companions() == []


# --- broken folders ------------------------------------------------------------------------------


def broken_folders() -> dict[str, tuple[dict[str, Any], dict[str, Tensor], str]]:
    fp8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    mxfp4 = {"quant_method": "mxfp4"}
    quantization, int4, _ = compressed("int4", 16, 64)
    words = torch.zeros(8, 16, dtype=torch.int32)
    return {
        "fp8 without scales": (fp8, {"q.weight": float8(4, 4)}, "has no q.weight_scale_inv"),
        "fp8 with integers as scales": (
            fp8,
            {"q.weight": float8(4, 4), "q.weight_scale_inv": codes(4, 1, 1)},
            "weight_scale_inv is int64",
        ),
        "nothing quantized": (gptq, {"q.weight": random(4, 4)}, "none is"),
        "gptq without scales": (gptq, {"q.qweight": words}, "has no q.scales"),
        "gptq of other scales": (
            gptq,
            {"q.qweight": words, "q.scales": positive(2, 8).half()},
            "q.scales is [2, 8], which does not fit qweight",
        ),
        "awq in floats": (awq, {"q.qweight": random(4, 4)}, "q.qweight is float32, not int32"),
        "mxfp4 of other scales": (
            mxfp4,
            {
                "e.down_proj_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8),
                "e.down_proj_scales": powers(2, 4, 2),
            },
            "e.down_proj_scales is [2, 4, 2], which does not fit e.down_proj_blocks",
        ),
        "int4 cut short": (
            quantization,
            {**int4, "m.q.weight_packed": int4["m.q.weight_packed"][:, :5]},
            "m.q.weight_packed is [16, 5], which does not fit a weight of [16, 64]",
        ),
        "int4 without a shape": (
            quantization,
            {n: t for n, t in int4.items() if not n.endswith("shape")},
            "has no m.q.weight_shape",
        ),
    }


@pytest.mark.parametrize("name", list(broken_folders()))
def test_a_broken_folder_is_one_line(name: str) -> None:
    quantization, tensors, says = broken_folders()[name]
    with pytest.raises(QplugError) as caught:
        opened(quantization, tensors)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


JUNK = [None, True, -1, 0, 1e300, "x", "re:(", [], [1], ["re:("], {}, {"a": 1}, 10**30]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_strange_configuration_is_no_bug(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(["int4 asym", "fp8 block", "nvfp4"]))
    quantization, stored, _ = compressed(case, 16, 64)
    group = quantization["config_groups"]["group_0"]
    changed = data.draw(st.sampled_from([quantization, group, group["weights"]]))
    changed = dict(changed)
    key = data.draw(st.sampled_from(sorted(changed.keys() - {"quant_method"})))
    changed[key] = data.draw(st.sampled_from(JUNK))
    if "num_bits" in changed:
        changed = {**group, "weights": changed}
    if "targets" in changed:
        changed = {**quantization, "config_groups": {"group_0": changed}}
    with suppress(QplugError):
        for tensor in opened(changed, stored).tensors.values():
            tensor.read()
