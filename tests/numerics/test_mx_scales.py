"""Scales that are powers of two: of weights and of inputs, as engines compute them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qplug import FLOAT_MAX, preset
from qplug.numerics import dequantize, fake_quantize_activations, minmax_scale
from qplug.numerics.rounding import round_to_nearest
from qplug.numerics.scale_formats import covering_power

MXFP8, MXFP4 = preset("MXFP8"), preset("MXFP4")
inputs = st.builds(
    lambda seed, exponent: (
        torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    ),
    st.integers(0, 1000),
    st.integers(-30, 30),
)


@pytest.mark.parametrize("dtype", ["e4m3", "e2m1"])
@pytest.mark.parametrize("power", [-100, -8, 0, 5])
def test_the_least_power_that_covers(dtype: str, power: int) -> None:
    args = replace(MXFP8.weights, dtype=dtype)
    top = FLOAT_MAX[dtype] * 2.0**power
    above = torch.nextafter(torch.tensor(top), torch.tensor(torch.inf)).item()
    peaks = torch.tensor([top, above, top / 2, top * 0.51, top * 1.99])
    wanted = torch.tensor([0.0, 1, -1, 0, 1]) + power
    assert torch.equal(covering_power(peaks, args).log2(), wanted)
    assert covering_power(torch.zeros(1), args).item() == 2.0**-126


def in_vllm(x: Tensor) -> Tensor:
    """``_mxfp8_e4m3_quantize_torch`` of vLLM 0.33, with codes times scales."""
    blocks = x.unflatten(-1, (-1, 32))
    peak = blocks.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
    exponent = (torch.ceil(torch.log2(peak / 448)) + 127).clamp(0, 254)
    scale = torch.exp2(exponent - 127).unsqueeze(-1)
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


@given(inputs)
@settings(max_examples=20)
def test_inputs_in_mxfp8_are_those_of_vllm(x: Tensor) -> None:
    assert MXFP8.activations is not None
    assert torch.equal(fake_quantize_activations(x, MXFP8.activations), in_vllm(x))


@given(inputs)
@settings(max_examples=20)
def test_inputs_in_mxfp4_are_the_nearest_and_do_not_saturate(x: Tensor) -> None:
    args = MXFP4.activations
    assert args is not None
    peaks = x.unflatten(-1, (-1, 32)).abs().amax(-1)
    scale = covering_power(peaks, args)
    assert ((peaks <= 6 * scale) & (peaks > 3 * scale)).all()
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([values, -values]) * scale.repeat_interleave(32, -1).unsqueeze(-1)
    least = (grid - x.unsqueeze(-1)).abs().amin(-1)
    assert torch.equal((fake_quantize_activations(x, args) - x).abs(), least)


@given(inputs)
@settings(max_examples=20)
def test_weights_in_mxfp8_do_not_saturate(weight: Tensor) -> None:
    scale, zero = minmax_scale(weight, MXFP8.weights)
    assert zero is None
    assert torch.equal(scale.log2() % 1, torch.zeros_like(scale))
    off = (dequantize(round_to_nearest(weight, MXFP8.weights)) - weight).abs()
    step = scale.repeat_interleave(32, 1) * 2.0**-9
    assert (off <= torch.maximum(weight.abs() / 16, step / 2)).all()
