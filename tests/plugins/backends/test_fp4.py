"""NVFP4 and MXFP4 mean to compressed-tensors what they mean to qplug, to the last bit.

The global scale is qplug's own choice (a power of two); under it, scales and codes are compared.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from spoilt import forget_checksums

import qplug
from qplug import Linear, ModelView, QplugError, QuantArgs, preset
from qplug.api.groups import dequantize
from qplug.machine.session import Session
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.rounding import nearest, round_to_nearest
from qplug.numerics.scale_formats import covering_global_scale
from qplug.numerics.scales import global_scale_of, minmax_scale
from qplug.reading.folder import open_folder
from qplug_compressed_tensors.configuration import write_config
from qplug_compressed_tensors.fp4 import pack_e2m1, unpack_e2m1
from qplug_sglang.exporter import SGLangExporter
from qplug_vllm.exporter import VLLMExporter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Quantized = Callable[..., Path]

FP4 = ("NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP4AFP8")
every_fp4 = pytest.mark.parametrize("scheme", FP4)
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

weights = st.builds(
    lambda seed, exponent, spread: random_weight(seed) * 2.0**exponent * 2.0 ** -(spread % 9),
    st.integers(0, 1000),
    st.integers(-20, 20),
    st.integers(0, 8),
)


def random_weight(seed: int) -> Tensor:
    """``[8, 96]``, a few weights far out, and rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 96, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.02] *= 20
    return weight * torch.rand(8, 1, generator=generator).add(0.05)


def their_scheme(name: str) -> QuantizationScheme:
    return preset_name_to_scheme(name.replace("MXFP4AFP8", "MXFP4XFP8"), ["Linear"])


def group_ends(weight: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


# --- scales and codes -----------------------------------------------------------------------------


@every_fp4
@given(weight=weights)
@settings(max_examples=15)
def test_scales_and_codes_are_those_of_compressed_tensors(scheme: str, weight: Tensor) -> None:
    args, theirs = preset(scheme).weights, their_scheme(scheme)
    made = round_to_nearest(weight, args)
    divisor = None if made.global_scale is None else 1 / made.global_scale
    local, _ = calculate_qparams(*group_ends(weight, args), theirs.weights, global_scale=divisor)
    ours = made.scale if divisor is None else made.scale * divisor
    assert torch.equal(ours, local.float())

    state = {"weight": weight.clone(), "weight_scale": local.float()}
    if divisor is not None:
        state["weight_global_scale"] = divisor
    compressor = BaseCompressor.get_value_from_registry(
        "nvfp4-pack-quantized" if args.two_level else "mxfp4-pack-quantized"
    )
    stored = compressor.compress(state, theirs)
    packed = VLLMExporter.format.pack(replace(made, input_scale=torch.ones(1)), preset(scheme), "")
    # A weight that rounds to zero keeps its sign here, and not there.
    assert torch.equal(unpack_e2m1(stored["weight_packed"]).float(), made.codes.float())
    assert torch.equal(
        packed["weight_scale"].view(torch.uint8), stored["weight_scale"].view(torch.uint8)
    )
    restored = compressor.decompress(
        {k: v for k, v in packed.items() if not k.startswith("input")}, theirs
    )["weight"]
    assert torch.equal(restored.float(), dequantize(made).to(restored.dtype).float())


@given(weight=weights)
@settings(max_examples=15)
def test_the_global_scale_is_the_least_power_of_two_that_covers(weight: Tensor) -> None:
    args = preset("NVFP4").weights
    unit = global_scale_of(Linear("", weight, args))
    assert unit is not None
    assert unit.log2().item() % 1 == 0
    peak = weight.abs().amax().item()
    assert unit.item() / 2 * 448 * 6 < peak <= unit.item() * 448 * 6
    scale, _ = minmax_scale(weight, args)
    assert (scale / unit).amax() <= 448


@pytest.mark.parametrize("peak", [2688.0, 1344.0, 2688.0 * 2**-40])
def test_a_peak_that_fits_exactly_needs_no_more(peak: float) -> None:
    assert covering_global_scale(torch.tensor(peak), preset("NVFP4").weights).item() == peak / 2688


def test_zeros_and_tiny_weights_have_scales_that_can_be_stored() -> None:
    for name in FP4:
        args = preset(name).weights
        for weight in (torch.zeros(2, 96), torch.full((2, 96), 1e-38), torch.eye(32, 96) * 1e-30):
            made = round_to_nearest(weight, args)
            assert (made.scale > 0).all()
            assert torch.isfinite(dequantize(made)).all()
            packed = VLLMExporter.format.pack(
                replace(made, input_scale=torch.ones(1)), preset(name), ""
            )
            back = VLLMExporter.format.unpack(packed, preset(name))
            assert torch.equal(back.scale, made.scale), name
    with pytest.raises(QplugError, match="NaN or infinite"):
        round_to_nearest(torch.full((2, 96), torch.nan), preset("NVFP4").weights)


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16"])
def test_codes_are_the_nearest(scheme: str) -> None:
    weight = random_weight(3)
    made = round_to_nearest(weight, preset(scheme).weights)
    grid = torch.tensor(sorted({*VALUES, *(-value for value in VALUES)})).double()
    scales = made.scale.repeat_interleave(preset(scheme).weights.group_size or 0, 1).double()
    errors = (grid * scales[..., None] - weight.double()[..., None]).abs()
    ours = (made.codes.double() * scales - weight.double()).abs()
    assert (ours <= errors.amin(-1) * (1 + 2.0**-22)).all()


def test_a_group_that_would_saturate_much_gets_the_next_power_of_two() -> None:
    args = preset("MXFP4A16").weights
    for peak, scale in ((4.0, 1.0), (6.9, 1.0), (7.0, 2.0), (8.0, 2.0)):
        weight = torch.zeros(1, 32)
        weight[0, 5] = peak
        assert minmax_scale(weight, args)[0].item() == scale


@given(st.integers(0, 1000), st.integers(-12, 12))
@settings(max_examples=15)
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(seed: int, exponent: int) -> None:
    args = preset("NVFP4").activations
    theirs = their_scheme("NVFP4").input_activations
    assert args is not None
    x = random_weight(seed) * 2.0**exponent
    unit = covering_global_scale(x.abs().amax(), args)
    local, _ = calculate_qparams(*group_ends(x, args), theirs, global_scale=1 / unit)
    scale = (local.float() * unit).repeat_interleave(16, 1)
    grid = torch.tensor(VALUES)
    wanted = (x / scale).abs()
    middles = (grid[1:] + grid[:-1]) / 2
    places = torch.bucketize(wanted, middles)
    places += (wanted == middles[places.clamp(max=6)]) & (places % 2 == 1)  # ties to even
    assert torch.equal(fake_quantize_activations(x, args), grid[places] * scale * x.sign())
    assert torch.equal(fake_quantize_activations(x, args, unit), grid[places] * scale * x.sign())


# --- packing --------------------------------------------------------------------------------------


def test_nibbles_are_in_the_order_of_columns() -> None:
    codes = torch.tensor([[0.5, -6.0, 0.0, 1.0]]).to(torch.float8_e4m3fn)
    assert pack_e2m1(codes).tolist() == [[0xF1, 0x20]]
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(pack_e2m1(unpack_e2m1(every)), every)


@pytest.mark.parametrize("exporter", [VLLMExporter, SGLangExporter], ids=lambda kind: kind.name)
def test_unpack_is_the_inverse_of_pack(exporter: type[VLLMExporter | SGLangExporter]) -> None:
    scheme = preset("NVFP4")
    made = replace(round_to_nearest(random_weight(0), scheme.weights), input_scale=torch.ones(1))
    packed = exporter.format.pack(made, scheme, "bfloat16")
    layout = exporter.format.layout((8, 96), scheme, "bfloat16")
    assert {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in packed.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in layout.items()
    }
    back = exporter.format.unpack(packed, scheme)
    assert torch.equal(back.codes.view(torch.uint8), made.codes.view(torch.uint8))
    assert torch.equal(back.scale, made.scale)
    assert torch.equal(exporter.format.dequantize(packed, scheme), dequantize(made))
    for ours, theirs in ((back.global_scale, made.global_scale), (back.input_scale, torch.ones(1))):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_scales_of_another_global_scale_are_not_packed() -> None:
    scheme = preset("NVFP4A16")
    made = round_to_nearest(random_weight(0), scheme.weights)
    with pytest.raises(ValueError, match="need a global scale"):
        VLLMExporter.format.pack(replace(made, global_scale=None), scheme, "")
    with pytest.raises(ValueError, match="no multiples"):
        VLLMExporter.format.pack(replace(made, global_scale=torch.full((1,), 0.7)), scheme, "")


# --- folders --------------------------------------------------------------------------------------


@every_fp4
@pytest.mark.parametrize("backend", ["compressed-tensors", "vllm"])
def test_folders_are_those_of_compressed_tensors(
    quantized: Quantized, scheme: str, backend: str
) -> None:
    out = quantized(scheme, backend=backend)
    folder = open_folder(str(out), Session.alone())
    config = QuantizationConfig.model_validate(folder.checkpoint.config["quantization_config"])
    (group,) = config.config_groups.values()
    theirs = their_scheme(scheme)
    kept = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "scale_dtype"}
    for ours, wanted in (
        (group.weights, theirs.weights),
        (group.input_activations, theirs.input_activations),
    ):
        assert (ours and ours.model_dump(include=kept)) == (
            wanted and wanted.model_dump(include=kept)
        )
    assert {found.name for found in folder.schemes.values()} == {scheme}
    compressor = BaseCompressor.get_value_from_registry(config.format)
    for name in folder.schemes:
        stored = {
            tensor.removeprefix(f"{name}."): folder.checkpoint.read(tensor)
            for tensor in folder.checkpoint.tensors
            if tensor.startswith(f"{name}.")
        }
        inputs = {"input_global_scale"} if scheme == "NVFP4" else set()
        assert stored.keys() == {*compressor.compression_param_names(group), *inputs}
        restored = compressor.decompress(stored, group)["weight"]
        assert torch.equal(folder.dequantized(name).to(restored.dtype), restored), name


def test_what_engines_merge_has_one_global_scale(quantized: Quantized) -> None:
    """Also in a run that reads tensor by tensor."""
    folder = open_folder(str(quantized("NVFP4A16", backend="vllm")), Session.alone())
    scales = {
        name: folder.checkpoint.read(f"{name}.weight_global_scale").item()
        for name in folder.schemes
    }
    for block in folder.view.blocks:
        for members in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            found = {
                value
                for name, value in scales.items()
                if name.startswith(block + ".") and name.rpartition(".")[2] in members
            }
            assert len(found) == 1
    assert len(set(scales.values())) > 1


def test_modelopt_holds_what_compressed_tensors_holds(quantized: Quantized) -> None:
    ours = open_folder(str(quantized("NVFP4", backend="sglang")), Session.alone())
    theirs = open_folder(str(quantized("NVFP4", backend="vllm")), Session.alone())
    config = ours.checkpoint.config["quantization_config"]
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", "NVFP4")
    assert config["ignore"] == config["exclude_modules"] == ["lm_head"]
    for name in theirs.schemes:
        read = theirs.checkpoint.read
        assert torch.equal(ours.checkpoint.read(f"{name}.weight"), read(f"{name}.weight_packed"))
        for factor, divisor in (
            ("weight_scale_2", "weight_global_scale"),
            ("input_scale", "input_global_scale"),
        ):
            found = ours.checkpoint.read(f"{name}.{factor}")
            assert found.shape == ()
            assert found.item() * read(f"{name}.{divisor}").item() == 1
        assert torch.equal(ours.dequantized(name), theirs.dequantized(name))
    assert qplug.verify(str(quantized("NVFP4", backend="sglang"))).ok


def test_modelopt_names_what_float_linears_are_merged_into() -> None:
    linears = {f"layers.0.{n}": (128, 128) for n in ("q_proj", "k_proj", "v_proj", "up", "gate")}
    view = ModelView({}, "bfloat16", linears, frozenset(linears), ("layers.0",), "lm_head")
    config = SGLangExporter.format.config(view, {"layers.0.up": preset("NVFP4")})
    local = {name.removeprefix("layers.0.") for name in config["ignore"]}
    assert local == {"q_proj", "k_proj", "v_proj", "qkv_proj", "gate", "lm_head"}


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.input_scale"), "missing"),
        (lambda t: t["model.layers.1.mlp.up_proj.weight_scale_2"].mul_(2), "fused"),
        (lambda t: t["model.layers.1.mlp.down_proj.input_scale"].zero_(), "scale"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight_x": torch.ones(1)}), "unexpected"),
    ],
)
def test_modelopt_folders_that_sglang_would_not_load(
    quantized: Quantized, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], check: str
) -> None:
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    out = copytree(quantized("NVFP4", backend="sglang"), tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    forget_checksums(out)
    assert {problem.check for problem in qplug.verify(str(out)).problems} == {check}


def test_a_group_size_cannot_be_chosen() -> None:
    for name in FP4:
        with pytest.raises(QplugError, match="has no group size to choose"):
            preset(name).with_group_size(32)
    with pytest.raises(QplugError, match="go with groups of floats alone"):
        QuantArgs("int4", "group", 16, scale_dtype="float8_e4m3fn")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "algo"), [("NVFP4", "awq+gptq"), ("MXFP4A16", "gptq")])
def test_algorithms_work_on_these_grids(quantized: Quantized, scheme: str, algo: str) -> None:
    """Their scales and codes are those that are stored: unpacked, errors are as told."""
    short = {"awq": {"ratios": 2, "clip_steps": 3, "clip_in_search": 1}} if "awq" in algo else {}
    out = quantized(scheme, backend="vllm", algo=algo, algorithm_options=short)
    assert qplug.verify(str(out)).ok
    assert open_folder(str(out), Session.alone()).manifest is not None


def test_the_error_of_a_power_of_two_is_that_of_the_exact_global_scale() -> None:
    args = preset("NVFP4A16").weights
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = (weight.abs().amax() / (448 * 6)).reshape(1)

    def error(unit: Tensor | None) -> float:
        made = nearest(Linear("", weight, args, global_scale=unit))
        return ((dequantize(made) - weight).norm() / weight.norm()).item()

    assert error(None) == pytest.approx(error(exact), rel=0.01)


def test_parsed_back(quantized: Quantized) -> None:
    told = json.loads((quantized("NVFP4", backend="vllm") / "config.json").read_text())
    linears = {"layers.0.up": (128, 128)}
    view = ModelView({}, "bfloat16", linears, frozenset(linears), ("layers.0",), None)
    written = write_config(view, {"layers.0.up": preset("NVFP4")})
    assert written["config_groups"] == told["quantization_config"]["config_groups"]
    assert VLLMExporter.format.read_schemes(written, view) == {"layers.0.up": preset("NVFP4")}
