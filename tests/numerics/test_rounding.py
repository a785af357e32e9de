"""The shared arithmetic against a plain version of it in double precision, written out by group.

Codes are compared with the nearest ones in double precision. Where weights and scales have at
most 11 significant bits (bfloat16, float16), their quotient is either a tie or further from one
than float32 rounds, so codes must be the very same; for float32 weights or scales, the quotient
may be one rounding of float32 off, which the bound states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qplug import QplugError, QuantArgs, QuantizedWeight
from qplug.api.groups import dequantize
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.losses import relative_error
from qplug.numerics.rounding import quantize, round_to_nearest
from qplug.numerics.scales import check_width, minmax_scale

HALVES = ("bfloat16", "float16")
FLOATS = (*HALVES, "float32")
FLOAT32_ULP = 2.0**-23
#: Half a unit in the last place of a scale, relative, and once more for rounding it twice.
ROUNDING = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10}
SMALLEST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}


def float_grid(dtype: str) -> list[float]:
    """All finite values of a float format, computed bit by bit."""
    exponent_bits, mantissa_bits = (int(part) for part in dtype[1:].split("m"))
    bias = 2 ** (exponent_bits - 1) - 1
    values = {0.0}
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            whole = exponent == 2**exponent_bits - 1
            if whole and (dtype == "e5m2" or mantissa == 2**mantissa_bits - 1):
                continue  # infinities and NaN
            fraction = mantissa / 2**mantissa_bits
            value = (
                (1 + fraction) * 2.0 ** (exponent - bias)
                if exponent
                else fraction * 2.0 ** (1 - bias)
            )
            values |= {value, -value}
    return sorted(values)


GRIDS = {dtype: np.array(float_grid(dtype)) for dtype in ("e4m3", "e5m2")}


def cells(shape: tuple[int, int], args: QuantArgs) -> Iterator[tuple[tuple[int, int], Any]]:
    """Each scale's place, and the part of the weight that it serves."""
    out, width = shape
    tall, wide = {
        "tensor": (out, width),
        "channel": (1, width),
        "group": (1, args.group_size),
        "block": args.block,
    }[args.strategy]
    for i in range(math.ceil(out / tall)):
        for j in range(math.ceil(width / wide)):
            rows = slice(i * tall, min((i + 1) * tall, out))
            yield (i, j), (rows, slice(j * wide, min((j + 1) * wide, width)))


def exact_scale(cell: np.ndarray, args: QuantArgs) -> float:
    """The scale before it is rounded to the dtype in which it is stored."""
    if not args.symmetric:
        return float(max(cell.max(), 0) - min(cell.min(), 0)) / (2**args.bits - 1)
    top = GRIDS[args.dtype][-1] if args.is_float else (2**args.bits - 1) / 2
    return float(np.abs(cell).max()) / float(top)


def check_scale(stored: float, exact: float, dtype: str) -> None:
    assert stored == torch.tensor(stored).to(getattr(torch, dtype)).item()
    if exact < SMALLEST[dtype]:
        # Subnormal float16 scales have few bits left; none is zero.
        assert SMALLEST[dtype] <= stored <= 2 * SMALLEST[dtype]
    else:
        step = max(ROUNDING[dtype] * exact, SMALLEST[dtype] if dtype == "float16" else 0)
        assert abs(stored - exact) <= step


def check_codes(codes: np.ndarray, cell: np.ndarray, scale: float, args: QuantArgs) -> None:
    """Each symmetric code is the nearest of all that there are, ties to even."""
    quotient = cell / scale
    if args.is_float:
        grid = GRIDS[args.dtype]
        distances = np.abs(np.clip(quotient, grid[0], grid[-1])[..., None] - grid)
        assert np.isin(codes, grid).all()
        taken = np.abs(np.clip(quotient, grid[0], grid[-1]) - codes)
        nearest = distances.min(-1)
    else:
        low, high = -(2 ** (args.bits - 1)), 2 ** (args.bits - 1) - 1
        assert ((low <= codes) & (codes <= high)).all()
        taken = np.abs(np.clip(quotient, low, high) - codes)
        nearest = np.abs(np.clip(quotient, low, high)[..., None] - np.arange(low, high + 1)).min(-1)
    assert (taken <= nearest + np.abs(quotient) * FLOAT32_ULP).all()


def check(weight: Tensor, args: QuantArgs) -> QuantizedWeight:
    before = weight.clone()
    found = round_to_nearest(weight, args)
    assert torch.equal(weight, before)  # untouched

    out, width = shape = (weight.shape[0], weight.shape[1])
    exact = weight.double().numpy()
    assert found.args == args
    assert found.codes.shape == weight.shape
    assert found.scale.shape == args.scale_shape(shape)
    assert found.scale.dtype == torch.float32
    codes = found.codes.double().numpy()
    seen = np.zeros((out, width), dtype=int)
    restored = np.zeros((out, width))
    for place, part in cells(shape, args):
        scale = found.scale[place].double().item()
        check_scale(scale, exact_scale(exact[part], args), args.scale_dtype)
        if args.symmetric:
            assert found.zero is None
            check_codes(codes[part], exact[part], scale, args)
            restored[part] = codes[part] * scale
        else:
            assert found.zero is not None
            assert found.zero.dtype == found.codes.dtype == torch.uint8
            zero = found.zero[place].item()
            check_asymmetric(codes[part], exact[part], scale, zero, args)
            restored[part] = (codes[part] - zero) * scale
        seen[part] += 1
    assert (seen == 1).all()  # the cells of this test are a partition

    values = dequantize(found)
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values.numpy(), restored.astype(np.float32))

    norm = np.linalg.norm(exact)
    if not 0 < norm < 1e-15 and norm < 1e15:  # squares are summed that float32 must hold
        wanted = np.linalg.norm(restored - exact) / norm if norm else 0
        assert relative_error(weight, found) == pytest.approx(wanted, rel=1e-5, abs=FLOAT32_ULP)
    return found


def check_asymmetric(
    codes: np.ndarray, cell: np.ndarray, scale: float, zero: int, args: QuantArgs
) -> None:
    top = 2**args.bits - 1
    assert ((codes >= 0) & (codes <= top)).all()
    low = -min(float(cell.min()), 0.0) / scale
    assert abs(zero - min(low, top)) <= 0.5 + low * FLOAT32_ULP
    nearest = np.clip(np.rint(cell / scale) + zero, 0, top)
    quotient = np.clip(cell / scale, -zero, top - zero)
    assert (
        np.abs(quotient - (codes - zero))
        <= np.abs(quotient - (nearest - zero)) + np.abs(cell / scale) * FLOAT32_ULP
    ).all()


def random_weight(shape: tuple[int, int], dtype: str, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    weight *= torch.exp(spread * torch.randn(shape, generator=generator))
    return weight.to(getattr(torch, dtype))


# --- weights -------------------------------------------------------------------------------------

INTEGERS = [f"int{bits}" for bits in range(2, 9)]
symmetry = st.booleans()
scale_dtypes = st.sampled_from(FLOATS)
sides = st.integers(1, 40)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, int], QuantArgs]:
    dtype = draw(st.sampled_from([*INTEGERS, "e4m3", "e5m2"]))
    symmetric = dtype.startswith("e") or draw(symmetry)
    strategy = draw(st.sampled_from(["tensor", "channel", "group", "block"]))
    rows, columns = draw(sides), draw(sides)
    group, block = None, None
    if strategy == "group":
        group = draw(st.sampled_from([1, 2, 3, 8, 16]))
        columns = group * draw(st.integers(1, 5))
    if strategy == "block":
        block = (draw(st.integers(1, 16)), draw(st.integers(1, 16)))
    args = QuantArgs(dtype, strategy, group, block, symmetric, scale_dtype=draw(scale_dtypes))
    return (rows, columns), args


@settings(max_examples=250)
@given(cases(), st.sampled_from(FLOATS), st.integers(0, 2**32))
def test_any_shape_and_format(
    case: tuple[tuple[int, int], QuantArgs], dtype: str, seed: int
) -> None:
    shape, args = case
    check(random_weight(shape, dtype, seed), args)


FORMATS = {
    "W4A16": QuantArgs("int4", "group", 128),
    "W4A16_ASYM": QuantArgs("int4", "group", 128, symmetric=False),
    "W8A8": QuantArgs("int8", "channel"),
    "tensor": QuantArgs("int8", "tensor"),
    "FP8_DYNAMIC": QuantArgs("e4m3", "channel"),
    "FP8_BLOCK": QuantArgs("e4m3", "block", block=(128, 128)),
}


def stored_as(args: QuantArgs, dtype: str) -> QuantArgs:
    return QuantArgs(**{**args.__dict__, "scale_dtype": dtype})


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 128), (7, 256), (130, 128)])
def test_presets(shape: tuple[int, int], name: str, scale_dtype: str) -> None:
    check(random_weight(shape, "bfloat16", 0), stored_as(FORMATS[name], scale_dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_a_large_weight_is_as_its_parts_are(name: str) -> None:
    """Large weights are worked on a few rows at a time."""
    args = FORMATS[name]
    weight = random_weight((1300, 2048), "bfloat16", 1)
    found = round_to_nearest(weight, args)
    if args.strategy == "tensor":
        scale = torch.tensor([[exact_scale(weight.double().numpy(), args)]]).float()
        assert torch.equal(found.scale, scale)
        parts = [quantize(part, scale, None, args) for part in weight.split(128)]
        assert torch.equal(found.codes, torch.cat(parts))
    else:
        rounded = [round_to_nearest(part, args) for part in weight.split(128)]
        assert torch.equal(found.codes.float(), torch.cat([r.codes.float() for r in rounded]))
        assert torch.equal(found.scale, torch.cat([r.scale for r in rounded]))
    restored, exact = dequantize(found).double(), weight.double()
    wanted = ((restored - exact).norm() / exact.norm()).item()
    assert relative_error(weight, found) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 130), (130, 1), (127, 129), (129, 131)])
def test_ragged_blocks(shape: tuple[int, int]) -> None:
    found = check(random_weight(shape, "bfloat16", 1), FORMATS["FP8_BLOCK"])
    assert found.scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale_dtype", HALVES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_very_nearest_where_double_precision_can_tell(
    bits: int, scale_dtype: str, dtype: str
) -> None:
    args = QuantArgs(f"int{bits}", "group", 32, scale_dtype=scale_dtype)
    weight = random_weight((64, 256), dtype, bits, spread=0.0)
    found = round_to_nearest(weight, args)
    scale = found.scale.double().repeat_interleave(32, dim=1)
    top = 2 ** (bits - 1)
    assert torch.equal(
        (weight.double() / scale).round().clamp(-top, top - 1).to(torch.int8), found.codes
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_zeros(name: str, dtype: str) -> None:
    weight = random_weight((6, 128), dtype, 2)
    weight[::2] = 0
    found = check(weight, stored_as(FORMATS[name], "float16" if dtype == "float16" else "bfloat16"))
    assert (dequantize(found)[::2] == 0).all()
    assert (found.scale > 0).all()
    zeros = check(torch.zeros_like(weight), FORMATS[name])
    assert relative_error(torch.zeros_like(weight), zeros) == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [1.0, -1.0, 3e-39, -3e-39, 1e-30, 1e30])
def test_all_alike(name: str, value: float) -> None:
    check(torch.full((4, 128), value), FORMATS[name])


@pytest.mark.parametrize("symmetric", [True, False])
def test_small_and_large_weights_with_float16_scales(symmetric: bool) -> None:
    args = QuantArgs("int4", "group", 8, symmetric=symmetric, scale_dtype="float16")
    for exponent in range(-30, 16):
        check(random_weight((4, 16), "float32", 3) * 2.0**exponent, args)


@pytest.mark.parametrize("positive", [True, False])
def test_weights_of_one_sign_have_zero_on_the_grid(positive: bool) -> None:
    weight = random_weight((8, 64), "bfloat16", 4).abs() * (1 if positive else -1)
    found = check(weight, QuantArgs("int4", "group", 32, symmetric=False))
    assert found.zero is not None
    assert (found.zero == (0 if positive else 15)).all()


def test_outer_codes_are_used() -> None:
    weight = torch.tensor([[-7.5, 7.5, 1.0, 0.0]])
    assert round_to_nearest(weight, QuantArgs("int4", "channel")).codes.tolist() == [[-8, 7, 1, 0]]
    asymmetric = round_to_nearest(weight, QuantArgs("int4", "channel", symmetric=False))
    assert asymmetric.codes.tolist() == [[0, 15, 9, 8]]
    assert asymmetric.zero is not None
    assert (asymmetric.scale.item(), asymmetric.zero.item()) == (1.0, 8)


def test_ties_go_to_even() -> None:
    scale = torch.ones(1, 1)
    halves = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    codes = quantize(halves, scale, None, QuantArgs("int4", "channel"))
    assert codes.tolist() == [[-2, -2, 0, 0, 2, 2]]
    # Between 16 and 32, neighbours in e4m3 are 2 apart: 17 is even-mantissa 16, 19 is 20.
    codes = quantize(torch.tensor([[17.0, 19.0]]), scale, None, QuantArgs("e4m3", "channel"))
    assert codes.tolist() == [[16, 20]]


@pytest.mark.parametrize(("dtype", "top"), [("e4m3", 448.0), ("e5m2", 57344.0)])
def test_floats_saturate(dtype: str, top: float) -> None:
    weight = torch.tensor([[top * 2, -top * 2, top * 1.01, 1e30]])
    codes = quantize(weight, torch.ones(1, 1), None, QuantArgs(dtype, "channel"))
    assert codes.tolist() == [[top, -top, top, top]]


def test_given_scales_are_used_as_they_are() -> None:
    weight = random_weight((6, 64), "float32", 5)
    args = QuantArgs("int4", "group", 16)
    scale, _ = minmax_scale(weight, args)
    codes = quantize(weight, scale / 2, None, args)
    assert torch.equal(codes, quantize(weight * 2, scale, None, args))
    assert (codes == 7).any()  # the outer weights saturate


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_that_is_a_view(name: str) -> None:
    base = random_weight((128, 256), "bfloat16", 6)
    for weight in (base.T, base[1::2, 128:], base[:, :128]):
        found = check(weight, FORMATS[name])
        assert torch.equal(
            found.codes.float(), round_to_nearest(weight.contiguous(), FORMATS[name]).codes.float()
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", [(0, 0), (149, 255)])
def test_weights_that_are_not_finite(name: str, bad: float, place: tuple[int, int]) -> None:
    weight = random_weight((150, 256), "bfloat16", 7)
    weight[place] = bad
    with pytest.raises(QplugError, match="the weight has NaN or infinite values"):
        round_to_nearest(weight, FORMATS[name])


def test_groups_that_do_not_divide_the_width() -> None:
    with pytest.raises(QplugError, match="groups of 128 do not divide its width, 100"):
        round_to_nearest(torch.zeros(2, 100), FORMATS["W4A16"])
    check_width(100, FORMATS["FP8_BLOCK"])
    check_width(256, FORMATS["W4A16"])


# --- errors --------------------------------------------------------------------------------------


def test_the_error_of_given_codes() -> None:
    args = QuantArgs("int4", "channel")
    held = QuantizedWeight(torch.tensor([[1, 2]], dtype=torch.int8), torch.ones(1, 1), None, args)
    assert relative_error(torch.tensor([[1.0, 2.0]]), held) == 0
    assert relative_error(torch.tensor([[3.0, 4.0]]), held) == pytest.approx(math.sqrt(8) / 5)
    assert relative_error(torch.zeros(1, 2), held) == 1


def test_inputs_of_the_error_are_left_as_they_are() -> None:
    weight = random_weight((20, 128), "float32", 8)
    held = round_to_nearest(weight, FORMATS["W4A16_ASYM"])
    assert held.zero is not None
    copies = [tensor.clone() for tensor in (weight, held.codes, held.scale, held.zero)]
    relative_error(weight, held)
    dequantize(held)
    for tensor, copy in zip((weight, held.codes, held.scale, held.zero), copies, strict=True):
        assert torch.equal(tensor, copy)


# --- activations ---------------------------------------------------------------------------------

ACTIVATIONS = {
    "int8 tokens": QuantArgs("int8", "token", dynamic=True),
    "int4 tokens": QuantArgs("int4", "token", dynamic=True),
    "fp8 tokens": QuantArgs("e4m3", "token", dynamic=True),
    "fp8 groups": QuantArgs("e4m3", "group", 4, dynamic=True),
}


def textbook_activations(x: np.ndarray, args: QuantArgs) -> tuple[np.ndarray, np.ndarray]:
    """Rounded values in double precision, and the scale of each."""
    size = args.group_size or x.shape[-1]
    groups = x.reshape(-1, size)
    grid = (
        GRIDS["e4m3"] if args.is_float else np.arange(-(2 ** (args.bits - 1)), 2 ** (args.bits - 1))
    )
    scale = np.maximum(np.abs(groups).max(1, keepdims=True) / grid[-1], 2.0**-126)
    index = np.abs((groups / scale)[..., None] - grid).argmin(-1)
    spread = np.broadcast_to(scale, groups.shape)
    return (grid[index] * scale).reshape(x.shape), spread.reshape(x.shape)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(ACTIVATIONS)),
    st.lists(st.integers(1, 5), max_size=3),
    st.integers(1, 6),
    st.sampled_from(FLOATS),
    st.integers(0, 2**32),
)
def test_activations(name: str, lead: list[int], groups: int, dtype: str, seed: int) -> None:
    args = ACTIVATIONS[name]
    x = random_weight((math.prod(lead), 4 * groups), dtype, seed).view(*lead, 4 * groups)
    before = x.clone()
    found = fake_quantize_activations(x, args)
    assert torch.equal(x, before)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    exact = x.double().numpy()
    wanted, scale = textbook_activations(exact, args)
    # As near to x as the textbook's, but for one rounding of float32 and that of the dtype.
    last = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype]
    taken = found.double().numpy()
    slack = np.abs(taken) * (FLOAT32_ULP + last) + 2.0**-24 * (dtype == "float16")
    assert (np.abs(taken - exact) <= np.abs(wanted - exact) + slack).all()
    if dtype == "float32":
        steps = taken / scale
        grid = GRIDS["e4m3"] if args.is_float else np.arange(-128, 128)
        distance = np.abs(steps[..., None] - grid).min(-1)
        assert (distance <= np.abs(steps) * 4 * FLOAT32_ULP).all()  # they are on the grid


def test_activations_by_hand() -> None:
    x = torch.tensor([[127.0, -63.5, 0.4, 0.6], [0.0, 0.0, 0.0, 0.0]])
    found = fake_quantize_activations(x, ACTIVATIONS["int8 tokens"])
    assert found.tolist() == [[127, -64, 0, 1], [0, 0, 0, 0]]
    x = torch.tensor([[448.0, 17.0, 19.0, -448.0, 1.0, 0.0, 0.0, 0.0]])
    found = fake_quantize_activations(x, ACTIVATIONS["fp8 groups"])
    assert found.tolist() == [[448, 16, 20, -448, 1, 0, 0, 0]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_input_is_the_largest_code(bits: int) -> None:
    """As in engines. compressed-tensors would clip it: its divisor lies half a step further."""
    top = 2 ** (bits - 1) - 1
    codes = torch.arange(-top, top + 1, dtype=torch.float32)
    x = torch.stack([codes, 0.625 * codes])
    args = QuantArgs(f"int{bits}", "token", dynamic=True)
    assert torch.equal(fake_quantize_activations(x, args), x)
    theirs = QuantizationArgs(num_bits=bits, strategy="token", dynamic=True)
    scale, _ = calculate_qparams(codes.min(), codes.max(), theirs)
    assert scale.item() == pytest.approx(top / (top + 0.5))


def test_activations_that_no_engine_rounds_so() -> None:
    with pytest.raises(NotImplementedError):
        fake_quantize_activations(torch.zeros(2, 4), QuantArgs("int8", "channel"))
    with pytest.raises(NotImplementedError):
        fake_quantize_activations(torch.zeros(2, 4), QuantArgs("int8", "tensor", symmetric=False))


def test_groups_of_inputs_that_do_not_divide_the_width() -> None:
    with pytest.raises(QplugError, match="groups of 4 do not divide its width, 6"):
        fake_quantize_activations(torch.zeros(2, 6), ACTIVATIONS["fp8 groups"])


def test_asymmetric_activations_by_hand() -> None:
    args = QuantArgs("int4", "token", symmetric=False, dynamic=True)
    x = torch.tensor([[-5, 0.4, 9.6, 10], [2, 7.3, 0.2, 15], [0, 0, 0, 0], [-30, -1, -3, -2]])
    found = fake_quantize_activations(x, args)
    assert found.tolist() == [[-5, 0, 10, 10], [2, 7, 0, 15], [0, 0, 0, 0], [-30, -0, -4, -2]]


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("dtype", ["int3", "int8"])
def test_asymmetric_activations_are_rounded_as_asymmetric_weights(
    dtype: str, size: int | None
) -> None:
    strategies: tuple[Any, Any] = ("group", "group") if size else ("token", "channel")
    inputs, rows = (QuantArgs(dtype, s, size, symmetric=False, dynamic=True) for s in strategies)
    x = random_weight((6, 8), "float32", 3)
    wanted = dequantize(round_to_nearest(x, rows))
    found = fake_quantize_activations(x.view(2, 3, 8), inputs)
    assert torch.equal(found.view(6, 8), wanted)
