"""vLLM's kernel for int4 weights and fp8 inputs: what it makes of codes and scales."""

from __future__ import annotations

from pathlib import Path

import torch

import qplug
from qplug import QuantizedWeight, preset
from qplug.api.groups import dequantize
from qplug.machine.session import Session
from qplug.numerics.rounding import round_to_nearest
from qplug.reading.folder import open_folder
from qplug_vllm.exporter import VLLMExporter
from qplug_vllm.int4_fp8 import multiplied


def fp8(value: float) -> float:
    """The nearest number of four significant bits, from 2^-9 to 448, ties to even."""
    if value == 0:
        return 0.0
    exponent = max(-6, torch.tensor(abs(value)).log2().floor().int().item())
    step = 2.0 ** (exponent - 3)
    return round(value / step) * step


def test_products_are_rounded_as_one_by_one() -> None:
    """In plain Python, from vLLM's source: scales by ``_fp8_quant``, then a table of products."""
    args = preset("W4AFP8").weights
    torch.manual_seed(0)
    weight = torch.randn(5, 384) * torch.rand(5, 3).add(0.05).repeat_interleave(128, 1)
    weight[3] *= 1e-5  # below the least unit
    made = round_to_nearest(weight, args)
    found = multiplied(made)
    for row in range(5):
        unit = max(made.scale[row].max().item() / 448, 1 / (448 * 512))
        for column in range(0, 384, 7):
            scale = fp8(fp8(made.scale[row, column // 128].item() / unit) / 8)
            wanted = fp8(made.codes[row, column].item() * scale) * unit * 8
            assert abs(found[row, column].item() - wanted) <= 1e-6 * abs(wanted)
    off = (found - dequantize(made)).norm() / dequantize(made).norm()
    assert 0.01 < off < 0.05


def test_powers_of_two_are_exact() -> None:
    args = preset("W4AFP8").weights
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(1, 16)
    weight = QuantizedWeight(codes, torch.tensor([[0.4375, 0.4375 / 1.75]]), None, args)
    assert torch.equal(multiplied(weight)[:, 128:], dequantize(weight)[:, 128:])


def test_int8_inputs_leave_the_weight_as_it_is() -> None:
    scheme = preset("W4A8")
    made = round_to_nearest(torch.randn(32, 128), scheme.with_scale_dtype("bfloat16").weights)
    exporter = VLLMExporter(VLLMExporter.Params())
    packed = exporter.format.pack(made, scheme, "bfloat16")
    assert torch.equal(exporter.effective_weight(packed, scheme), dequantize(made))


def test_the_reader_takes_what_the_engine_multiplies_with(tmp_path: Path) -> None:
    qplug.quantize("qplug:demo", tmp_path / "out", scheme="W4AFP8", backend="vllm", device="cpu")
    folder = open_folder(str(tmp_path / "out"), Session.alone())
    name = "model.layers.0.mlp.up_proj"
    tensors, scheme = folder.packed(name), folder.schemes[name]
    wanted = VLLMExporter(VLLMExporter.Params()).effective_weight(tensors, scheme)
    assert torch.equal(folder.parameter(f"{name}.weight"), wanted)
    assert torch.equal(dict(folder.weights())[f"{name}.weight"], wanted)
    assert not torch.equal(folder.dequantized(name), wanted)
