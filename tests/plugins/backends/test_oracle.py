"""What qplug writes means to compressed-tensors what it means to qplug, to the last bit.

compressed-tensors is the reference reader; it shares no code with qplug. Where it has no exact
answer (which code is nearest), the oracle is a search through all codes in exact arithmetic.
"""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils import match_named_modules

from qplug import PRESETS, ModelView, QuantArgs, Scheme, preset
from qplug.api.groups import dequantize
from qplug.machine.session import Session
from qplug.numerics.rounding import round_to_nearest
from qplug.numerics.scales import minmax_scale
from qplug.reading.folder import open_folder
from qplug_compressed_tensors.configuration import write_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Quantized = Callable[..., Path]

GROUP_SIZES = (32, 64, 128, -1)
BACKENDS = ("compressed-tensors", "vllm", "sglang")
CASES = [
    *((name, size) for name in ("W4A16", "W4A16_ASYM", "W8A16") for size in GROUP_SIZES),
    *((name, None) for name in ("W8A8", "W8A8_STATIC", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")),
    *((name, None) for name in ("W4AFP8", "W4A8", "W3A16", "MXFP8")),
    *((name, None) for name in ("FP8A16", "FP8A16_TENSOR", "FP8A16_BLOCK")),
]
#: Schemes that differ from a case in the number of bits, or in zero points.
LIKE_OTHERS = [
    *(f"W{bits}A16{zeros}" for bits in (2, 5, 6, 7) for zeros in ("", "_ASYM")),
    *("W3A16_ASYM", "W8A16_ASYM"),
]
#: What an engine does not serve; compressed-tensors has them all.
REFUSED = {
    "sglang": {"W8A8_STATIC", "W4AFP8", "W4A8", "W3A16", "MXFP8", "FP8A16_BLOCK", *LIKE_OTHERS},
    "vllm": {"FP8A16_BLOCK"},
}
every_case = pytest.mark.parametrize(
    ("scheme", "group_size"),
    [*CASES, *(pytest.param(name, 64, marks=pytest.mark.slow) for name in LIKE_OTHERS)],
)


def test_every_preset_is_a_case() -> None:
    fp4 = {"NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP4AFP8"}  # in test_fp4
    assert {name for name, _ in CASES} | {*LIKE_OTHERS} | fp4 == set(PRESETS)


def bits(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


# --- folders -------------------------------------------------------------------------------------


@every_case
def test_weights_are_those_that_compressed_tensors_restores(
    quantized: Quantized, scheme: str, group_size: int | None
) -> None:
    out = quantized(scheme, group_size=group_size, backend="compressed-tensors")
    folder = open_folder(str(out), Session.alone())
    config = QuantizationConfig.model_validate(folder.checkpoint.config["quantization_config"])
    (group,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    assert len(folder.schemes) == 28  # 4 blocks of 7
    for name in folder.schemes:
        stored = {
            tensor.removeprefix(f"{name}."): folder.checkpoint.read(tensor)
            for tensor in folder.checkpoint.tensors
            if tensor.startswith(f"{name}.")
        }
        inputs = {"input_scale"} if folder.schemes[name].static_inputs else set()
        assert stored.keys() == {*compressor.compression_param_names(group), *inputs}
        theirs = compressor.decompress(stored, group)["weight"]
        ours = folder.dequantized(name).to(theirs.dtype)
        assert torch.equal(bits(ours), bits(theirs)), name


@every_case
def test_the_three_backends_write_the_same_tensors(
    quantized: Quantized, scheme: str, group_size: int | None
) -> None:
    files = {
        (quantized(scheme, group_size=group_size, backend=name) / "model.safetensors").read_bytes()
        for name in BACKENDS
        if scheme not in REFUSED.get(name, ())
    }
    assert len(files) == 1


@every_case
def test_config_is_valid_and_covers_what_is_quantized(
    quantized: Quantized, scheme: str, group_size: int | None
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    out = quantized(scheme, group_size=group_size, backend="compressed-tensors")
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(told)
    (group,) = config.config_groups.values()

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out))
    covered = {name for name, _ in match_named_modules(model, group.targets, config.ignore)}
    assert covered == open_folder(str(out), Session.alone()).schemes.keys()


def essence(args: QuantizationArgs | None) -> dict[str, Any] | None:
    kept = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"}
    return None if args is None else args.model_dump(include=kept)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_compressed_tensors(name: str) -> None:
    # Static int8 has no name there: it is W8A8 with the inputs of FP8 in int8. Of zero points only
    # those of four bits have a name. fp8 with float inputs is each fp8 without its inputs.
    named = {"MXFP4AFP8": "MXFP4XFP8", "W4A16_ASYM": "W4A16_ASYM", "FP8A16": "FP8_DYNAMIC"}
    named |= {"FP8A16_TENSOR": "FP8", "FP8A16_BLOCK": "FP8_BLOCK"}
    usual = name.removesuffix("_STATIC").removesuffix("_ASYM")
    theirs = preset_name_to_scheme(named.get(name, usual), ["Linear"])
    theirs.weights.symmetric = theirs.weights.symmetric and "_ASYM" not in name
    if name.startswith("FP8A16"):
        theirs.input_activations = None
    if name == "W8A8_STATIC":
        fp8 = preset_name_to_scheme("FP8", ["Linear"]).input_activations
        theirs.input_activations = fp8.model_copy(update={"type": "int"})
    config = write_config(one_linear(), {"layers.0.up": preset(name)})
    written = QuantizationConfig.model_validate(config)
    (group,) = written.config_groups.values()
    assert essence(group.weights) == essence(theirs.weights)
    assert essence(group.input_activations) == essence(theirs.input_activations)
    assert group.output_activations is None


def one_linear() -> ModelView:
    linears = {"layers.0.up": (128, 128)}
    return ModelView({}, "bfloat16", linears, frozenset(linears), ("layers.0",), None)


def test_mixed_schemes_validate_and_name_their_own_format() -> None:
    linears = {f"layers.{n}.{part}": (128, 128) for n in range(2) for part in ("up", "down")}
    view = ModelView({}, "bfloat16", linears, frozenset(linears), ("layers.0", "layers.1"), None)
    schemes = {name: preset("W8A8" if name.endswith("up") else "W4A16") for name in linears}
    config = QuantizationConfig.model_validate(write_config(view, schemes))
    assert config.format == "mixed-precision"
    found = {
        (*group.targets, group.weights.num_bits, group.format)
        for group in config.config_groups.values()
    }
    assert found == {
        (r"re:.*\.up$", 8, "int-quantized"),
        (r"re:.*\.down$", 4, "pack-quantized"),
    }


# --- scales and codes ----------------------------------------------------------------------------


def weights_of(scheme: str, group_size: int | None, dtype: torch.dtype) -> QuantArgs:
    """The scheme's weights as the backends store them: see ``Exporter.scale_dtype``."""
    found = preset(scheme)
    if group_size is not None:
        found = found.with_group_size(group_size)
    if found.weights.fixes_scales:
        return found.weights
    packed = found.activations is None or found.name in ("W4AFP8", "W4A8")
    stored = str(dtype).removeprefix("torch.") if packed else "float32"
    return replace(found.weights, scale_dtype=stored)


def their_args(args: QuantArgs) -> QuantizationArgs:
    view = one_linear()
    config = write_config(view, {"layers.0.up": Scheme("any", args)})
    return QuantizationArgs.model_validate(config["config_groups"]["group_0"]["weights"])


def random_weight(args: QuantArgs, dtype: torch.dtype) -> Tensor:
    """Small, of two groups a row or more; ragged where blocks may be. Some values stand out."""
    shape = (130, 200) if args.block else (6, 256)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight[torch.rand(shape, generator=generator) < 0.01] *= 8
    weight[1] = weight[1].abs() + 0.01  # a row all on one side of zero
    return weight.to(dtype)


def pieces(weight: Tensor, args: QuantArgs) -> list[tuple[tuple[int, int], Tensor]]:
    """The parts of ``weight`` that share a scale, each with the scale's place."""
    rows = weight.shape[0] if args.strategy == "tensor" else 1
    tall, wide = args.block or (rows, args.group_size or weight.shape[1])
    return [
        ((row // tall, column // wide), weight[row : row + tall, column : column + wide])
        for row in range(0, weight.shape[0], tall)
        for column in range(0, weight.shape[1], wide)
    ]


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_case
@every_dtype
def test_scales_are_those_of_compressed_tensors(
    scheme: str, group_size: int | None, dtype: torch.dtype
) -> None:
    args = weights_of(scheme, group_size, dtype)
    weight = random_weight(args, dtype)
    exact, _ = minmax_scale(weight, replace(args, scale_dtype="float32"))
    stored, _ = minmax_scale(weight, args)
    lowest, highest = torch.empty_like(exact), torch.empty_like(exact)
    for place, part in pieces(weight.float(), args):
        lowest[place], highest[place] = part.min(), part.max()
    theirs, _ = calculate_qparams(lowest, highest, their_args(args))
    if args.fixes_scales:  # a peak of 448 units stays there; theirs makes it 224 of the next one
        at_the_end = torch.maximum(-lowest, highest) == stored * 448
        assert torch.equal(torch.where(at_the_end, stored * 2, stored), theirs)
        return
    assert torch.equal(exact, theirs)
    # Rounding to the dtype that engines hold comes before the codes, and is all that differs.
    assert torch.equal(stored, theirs.to(getattr(torch, args.scale_dtype)).float())


def all_values(args: QuantArgs) -> tuple[Tensor, Tensor]:
    """Every finite value of the grid in float64, and whether its last bit is 0, for ties."""
    if args.is_float:
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        even = torch.arange(256) % 2 == 0
        finite = ~values.float().isnan()
        return values[finite].double(), even[finite]
    low, high = args.code_range
    values = torch.arange(low, high + 1)
    return values.double(), values % 2 == 0


def distance(codes: Tensor, part: Tensor, scale: float, zero: int) -> Tensor:
    """From weights (24 bits) to what codes stand for (at most 33 bits).

    Exact for the codes that are near, in float64: close numbers differ by few bits.
    """
    return ((codes - zero) * scale - part.double()).abs()


def nearest(part: Tensor, scale: float, zero: int, args: QuantArgs) -> Tensor:
    """The code nearest to each weight, by trying all of them."""
    values, even = all_values(args)
    # What is rounded is w / s, before the zero point is added: even is what is even without it.
    even = even if zero % 2 == 0 else ~even
    distances = distance(values, part[..., None], scale, zero)
    closest = distances == distances.amin(-1, keepdim=True)
    at_tie = closest & even
    chosen = torch.where(at_tie.any(-1, keepdim=True), at_tie, closest)
    return values[chosen.int().argmax(-1)]


def assert_nearest(weight: Tensor, args: QuantArgs) -> None:
    found = round_to_nearest(weight, args)
    codes = found.codes.double()
    for (place, part), (_, ours) in zip(pieces(weight, args), pieces(codes, args), strict=True):
        scale = found.scale[place].item()
        zero = 0 if found.zero is None else int(found.zero[place])
        best = nearest(part, scale, zero, args)
        # The peak of a symmetric group lies half way by construction, but for the rounding of its
        # scale. w / s has 24 bits, so a weight that is off the middle by less looks half way.
        # That and nothing else may decide for the other code; never at an exact tie.
        excess = distance(ours, part, scale, zero) - distance(best, part, scale, zero)
        almost_half_way = (excess > 0) & (excess <= 2.0**-23 * part.double().abs())
        assert ((ours == best) | almost_half_way).all(), place
        if found.zero is not None:
            low = min(Fraction(part.min().item()), Fraction(0))
            wanted = round(-low / Fraction(scale))  # Fractions round ties to even
            assert zero == min(max(wanted, 0), args.code_range[1])


@every_case
@every_dtype
def test_codes_are_the_nearest(scheme: str, group_size: int | None, dtype: torch.dtype) -> None:
    args = weights_of(scheme, group_size, dtype)
    assert_nearest(random_weight(args, dtype), args)


@every_case
def test_codes_half_way_go_to_even(scheme: str, group_size: int | None) -> None:
    args = weights_of(scheme, group_size, torch.bfloat16)
    scale = 2.0**-5
    if args.is_float:
        grid = all_values(args)[0].unique()
        steps, ends = (grid[1:] + grid[:-1]) / 2, (-448.0, 448.0)
    else:
        low, high = args.code_range
        # A range that gives a scale of just 2**-5, and for asymmetric codes an odd zero point.
        below = min(5.0, high - 2.0)
        ends = (low + 0.5, high + 0.5) if args.symmetric else (-below, high - below)
        steps = torch.arange(ends[0] // 1, ends[1] // 1) + 0.5
    tall, wide = args.block or (1, args.group_size or 256)
    weight = torch.zeros(tall, wide)
    halves = steps[torch.arange(tall * wide - 2) % len(steps)]
    weight.view(-1)[:2] = torch.tensor(ends)
    weight.view(-1)[2:] = halves
    weight = (weight * scale).to(torch.bfloat16)

    found = round_to_nearest(weight, args)
    assert found.scale.unique().tolist() == [scale]
    assert torch.equal(weight.double().flatten()[2:], halves.double() * scale)  # ties they are
    assert_nearest(weight, args)


@every_case
def test_dequantized_is_code_times_scale(scheme: str, group_size: int | None) -> None:
    args = weights_of(scheme, group_size, torch.bfloat16)
    weight = round_to_nearest(random_weight(args, torch.bfloat16), args)
    restored = dequantize(weight)
    codes = weight.codes.float()
    for (place, code), (_, value) in zip(pieces(codes, args), pieces(restored, args), strict=True):
        zero = 0 if weight.zero is None else int(weight.zero[place])
        assert torch.equal(value, (code - zero) * weight.scale[place])
