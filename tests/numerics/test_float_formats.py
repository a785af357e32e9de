"""Float formats of any width, against their standards, a search of the grid, and torch's casts.

Where numbers are compared they are compared for equality: each rounding is of one float32, and
double precision holds the middle of any two neighbours of a grid.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qplug import PRESETS, QplugError, QuantArgs, Scheme, preset
from qplug.api.groups import dequantize
from qplug.api.scheme import FLOAT_MAX, FLOAT_STEP, FLOATS
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.losses import relative_error
from qplug.numerics.rounding import (
    code_dtype,
    quantize,
    round_codes,
    round_floats,
    round_to_nearest,
)
from qplug.numerics.scales import minmax_scale

every_format = pytest.mark.parametrize("dtype", FLOATS)
formats = st.sampled_from(sorted(FLOATS))
#: Those that have a dtype of their own in torch, which rounds to nearest, ties to even.
NATIVE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e8m7": torch.bfloat16}


def positive_grid(dtype: str) -> np.ndarray:
    """The values of a format from zero up: the place of each is its code without the sign."""
    e, m = int(dtype[1]), int(dtype[3])
    bias = 2 ** (e - 1) - 1
    values = []
    for code in range(2 ** (e + m)):
        exponent, mantissa = divmod(code, 2**m)
        if exponent == 2**e - 1 and (dtype == "e5m2" or e == 8):
            break  # infinity and NaN
        if dtype == "e4m3" and code == 127:
            break  # NaN
        whole = Fraction(mantissa, 2**m) + (exponent > 0)
        values.append(float(whole * Fraction(2) ** (max(exponent, 1) - bias)))
    return np.array(values)


def searched(values: Tensor, dtype: str) -> np.ndarray:
    """The nearest of the grid, found by where ``values`` lie between the middles of neighbours."""
    grid = positive_grid(dtype)
    exact = values.double().numpy()
    size = np.minimum(np.abs(exact), grid[-1])
    middles = (grid[:-1] + grid[1:]) / 2
    code = np.searchsorted(middles, size, side="left")  # ties go down
    tie = np.isin(size, middles)
    # To the even mantissa; where there is none, up, but from zero.
    code = code + (tie & ((code > 0) if dtype[3] == "0" else (code % 2 == 1)))
    return np.where(np.signbit(exact), -1.0, 1.0) * grid[code]


def rounded(values: Tensor, args: QuantArgs) -> Tensor:
    before = values.clone()
    codes = round_floats(before, args)
    assert codes.dtype == code_dtype(args)
    assert codes.shape == values.shape
    return codes.float()


def check(values: Tensor, dtype: str) -> None:
    found = rounded(values, QuantArgs(dtype, "channel")).double().numpy()
    wanted = searched(values, dtype)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))  # that of zeros too


def every_bfloat16() -> Tensor:
    """All finite values of bfloat16, as float32: subnormals, and both zeros."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.bfloat16).float()
    return values[values.isfinite()]


def strided_float32(stride: int) -> Tensor:
    """One in ``stride`` of all finite values of float32."""
    patterns = torch.arange(-(2**31), 2**31, stride).to(torch.int32)
    values = patterns.view(torch.float32)
    return values[values.isfinite()]


# --- what the formats are -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "largest", "step"),
    [
        ("e4m3", 448, 2.0**-9),  # OCP OFP8
        ("e5m2", 57344, 2.0**-16),
        ("e2m1", 6, 0.5),  # OCP MX
        ("e3m2", 28, 0.0625),
        ("e2m3", 7.5, 0.125),
        ("e4m7", 510, 2.0**-13),  # as LLMC has it
        (
            "e8m7",
            torch.finfo(torch.bfloat16).max,
            torch.finfo(torch.bfloat16).smallest_normal / 128,
        ),
        ("e1m0", 2, 2),
        ("e3m0", 16, 0.25),
    ],
)
def test_ends_of_the_formats_that_someone_defined(dtype: str, largest: float, step: float) -> None:
    assert (FLOAT_MAX[dtype], FLOAT_STEP[dtype]) == (largest, step)


@every_format
def test_ends_are_those_of_the_grid(dtype: str) -> None:
    grid = positive_grid(dtype)
    assert (FLOAT_MAX[dtype], FLOAT_STEP[dtype]) == (grid[-1], grid[1])
    args = QuantArgs(dtype, "channel")
    assert args.is_float
    assert args.bits == 1 + int(dtype[1]) + int(dtype[3])


@every_format
def test_codes_have_the_narrowest_dtype_that_holds_them(dtype: str) -> None:
    grid = torch.from_numpy(positive_grid(dtype)).float()

    def holds(kind: torch.dtype) -> bool:
        return torch.equal(grid.to(kind).float(), grid)

    kinds = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16)
    assert code_dtype(QuantArgs(dtype, "channel")) == next(kind for kind in kinds if holds(kind))


@pytest.mark.parametrize("dtype", ["e2m1", "e3m2", "e2m3", "e4m3"])
def test_codes_of_the_small_formats_are_bytes(dtype: str) -> None:
    assert code_dtype(QuantArgs(dtype, "channel")) == torch.float8_e4m3fn


# --- rounding -------------------------------------------------------------------------------------


@every_format
def test_every_bfloat16_is_rounded_to_the_nearest(dtype: str) -> None:
    check(every_bfloat16(), dtype)


@every_format
def test_at_the_middle_of_neighbours_and_beside_it(dtype: str) -> None:
    grid = positive_grid(dtype)
    middles = torch.from_numpy((grid[:-1] + grid[1:]) / 2).float()
    assert (middles.double().numpy() == (grid[:-1] + grid[1:]) / 2).all()
    infinity = torch.tensor(float("inf"))
    beside = [middles.nextafter(infinity), middles.nextafter(-infinity)]
    values = torch.cat([torch.from_numpy(grid).float(), middles, *beside])
    check(torch.cat([values, -values]), dtype)


@pytest.mark.parametrize("dtype", NATIVE)
def test_rounding_of_its_own_is_that_of_torch(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qplug.numerics.rounding._FLOAT_DTYPES", {}
    )  # what else would round to the first
    top = FLOAT_MAX[dtype]
    for values in (every_bfloat16(), strided_float32(4093)):
        wanted = values.clamp(-top, top).to(NATIVE[dtype]).float()
        found = rounded(values, QuantArgs(dtype, "channel"))
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))  # signs of zeros too


@settings(max_examples=100)
@given(
    st.sampled_from([name for name in sorted(FLOATS) if sum(FLOATS[name]) < 9]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-8, 8, width=32),
)
def test_nothing_on_the_grid_is_nearer(dtype: str, anywhere: float, near: float) -> None:
    positive = [Fraction(value) for value in positive_grid(dtype)]
    for value in (anywhere, near):
        args = QuantArgs(dtype, "channel")
        found = Fraction(rounded(torch.tensor([value]), args).item())
        exact = Fraction(max(-FLOAT_MAX[dtype], min(value, FLOAT_MAX[dtype])))
        assert abs(found - exact) == min(abs(abs(exact) - other) for other in positive)


@every_format
def test_what_is_on_the_grid_stays_and_what_is_not_finite(dtype: str) -> None:
    args = QuantArgs(dtype, "channel")
    grid = torch.from_numpy(positive_grid(dtype)).float()
    assert torch.equal(rounded(grid, args), grid)
    ends = rounded(torch.tensor([float("inf"), float("-inf"), float("nan")]), args)
    assert ends[:2].tolist() == [FLOAT_MAX[dtype], -FLOAT_MAX[dtype]]
    assert ends[2].isnan()


# --- weights and activations ----------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, QuantArgs]:
    strategy = draw(st.sampled_from(["tensor", "channel", "group", "block"]))
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    group = draw(st.sampled_from([1, 3, 8])) if strategy == "group" else None
    block = (draw(st.integers(1, 7)), draw(st.integers(1, 7))) if strategy == "block" else None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, columns * (group or 1), generator=generator)
    weight *= torch.exp(3 * torch.randn(weight.shape, generator=generator))
    scale_dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    args = QuantArgs(draw(formats), strategy, group, block, scale_dtype=scale_dtype)
    return weight, args


def spread(scale: Tensor, args: QuantArgs, shape: torch.Size) -> Tensor:
    """A scale for each weight."""
    tall, wide = {
        "tensor": tuple(shape),
        "channel": (1, shape[1]),
        "group": (1, args.group_size),
        "block": args.block,
    }[args.strategy]
    rows, columns = torch.arange(shape[0]) // tall, torch.arange(shape[1]) // wide
    return scale[rows][:, columns]


@settings(max_examples=100)
@given(layers())
def test_weights_of_any_shape_and_format(layer: tuple[Tensor, QuantArgs]) -> None:
    weight, args = layer
    before = weight.clone()
    found = round_to_nearest(weight, args)
    assert torch.equal(weight, before)
    assert found.zero is None
    scale = spread(found.scale, args, weight.shape)
    wanted = searched(weight / scale, args.dtype)
    np.testing.assert_array_equal(found.codes.double().numpy(), wanted)
    assert torch.equal(dequantize(found), found.codes.float() * scale)
    # The largest weight of all is at the end of the grid, but for a scale that is rounded or least.
    if args.scale_dtype == "float32" and FLOATS[args.dtype][0] < 8:
        assert np.abs(wanted).max() == FLOAT_MAX[args.dtype]
    codes, values = round_codes(weight.clone(), scale.contiguous(), None, args)
    assert torch.equal(codes, found.codes.float())
    assert torch.equal(values, dequantize(found))
    norm = weight.double().norm()
    off = ((dequantize(found).double() - weight.double()).norm() / norm).item()
    assert relative_error(weight, found) == pytest.approx(off, rel=1e-5, abs=1e-7)


@settings(max_examples=100)
@given(formats, st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 2**32))
def test_activations_of_any_format(
    dtype: str, tokens: int, groups: int, grouped: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 8 * groups, generator=generator) * 30
    args = QuantArgs(dtype, "token", dynamic=True)
    if grouped:
        args = QuantArgs(dtype, "group", 8, dynamic=True)
    parts = x.view(-1, 8 if grouped else 8 * groups)
    scale = (parts.abs().amax(1, keepdim=True) / FLOAT_MAX[dtype]).clamp(min=2.0**-126)
    wanted = torch.from_numpy(searched(parts / scale, dtype)).float() * scale
    assert torch.equal(fake_quantize_activations(x, args), wanted.view(x.shape))


@pytest.mark.parametrize("dtype", ["e2m1", "e3m2", "e2m3", "e4m3", "e5m2", "e4m7"])
def test_zeros_get_a_scale(dtype: str) -> None:
    args = QuantArgs(dtype, "group", 4)
    weight = torch.tensor([[0.0, 0, 0, 0, 1, -2, 3, -4]])
    scale, _ = minmax_scale(weight, args)
    codes = quantize(weight, scale, None, args)
    assert (scale > 0).all()
    assert codes.float()[0, :4].tolist() == [0, 0, 0, 0]


# --- schemes --------------------------------------------------------------------------------------


def test_schemes_of_floats() -> None:
    assert preset("we2m1a16").weights == QuantArgs("e2m1", "group", 128)
    assert preset("we2m1a16").activations is None
    token = QuantArgs("e5m2", "token", dynamic=True)
    assert preset("WE5M2AE5M2") == Scheme("WE5M2AE5M2", QuantArgs("e5m2", "channel"), token)
    assert preset("W4AE5M2") == Scheme("W4AE5M2", QuantArgs("int4", "channel"), token)
    assert preset("W4AE5M2_ASYM").weights == QuantArgs("int4", "channel", symmetric=False)
    assert preset("WE3M2A8").activations == QuantArgs("int8", "token", dynamic=True)
    assert preset("WE2M1A16").with_group_size(32).weights.group_size == 32
    assert preset("WE2M1A16").with_group_size(-1).weights == QuantArgs("e2m1", "channel")


def test_what_engines_serve_has_one_name() -> None:
    assert preset("WE4M3AE4M3") is PRESETS["FP8_DYNAMIC"]


@pytest.mark.parametrize("name", ["WE2M1A16", "WE4M3AE5M2", "W4AE4M3", "WE8M7AE1M0"])
@pytest.mark.parametrize("by_qtorch", [False, True])
def test_they_survive_json(name: str, by_qtorch: bool) -> None:
    scheme = preset(name)
    if by_qtorch and "E8" not in name:
        scheme = scheme.with_qtorch()
        assert scheme.uses_qtorch
    assert Scheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("WE9M1A16", "there is no number format 'e9m1': use int2 to int8, or e<E>m<M> with 1 to 8"),
        ("WE0M3A16", "there is no number format 'e0m3'"),
        ("WE4M8A16", "there is no number format 'e4m8'"),
        ("WE4M3AE10M3", "there is no number format 'e10m3'"),
        ("WE4M3A16_ASYM", "e4m3 is a float format, which is always symmetric"),
        ("WE4MA16", "no scheme 'WE4MA16'"),
        ("WE4M3", "no scheme 'WE4M3'"),
        ("WE2M1A1", "no scheme 'WE2M1A1'"),
    ],
)
def test_formats_that_do_not_exist(name: str, sentence: str) -> None:
    with pytest.raises(QplugError) as refused:
        preset(name)
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", ["e4m3fn", "e4", "int1", "int9", "int16", "float8", "e44m3", ""])
def test_dtypes_that_do_not_exist(dtype: str) -> None:
    with pytest.raises(QplugError, match="there is no number format"):
        QuantArgs(dtype, "channel")


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "WE5M2AE5M2", "FP8_BLOCK"])
def test_floats_with_rounded_inputs_have_no_groups_to_choose(name: str) -> None:
    with pytest.raises(QplugError, match="has no group size to choose"):
        preset(name).with_group_size(32)
