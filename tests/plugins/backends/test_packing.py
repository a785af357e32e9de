"""Packing loses nothing, lays codes out as compressed-tensors does, and keeps its hands off."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from torch import Tensor

from qplug import PRESETS, QuantArgs, QuantizedWeight, Scheme
from qplug_compressed_tensors.format import CompressedTensors
from qplug_compressed_tensors.packing import pack_words, unpack_words

FORMAT = CompressedTensors()

SCHEMES = [
    # Codes of four-bit floats have tests of their own, beside this file.
    *(scheme for scheme in PRESETS.values() if scheme.weights.dtype != "e2m1"),
    *(
        PRESETS[name].with_group_size(size)
        for name in ("W4A16", "W4A16_ASYM", "W8A16")
        for size in (8, 32, 64, -1)
    ),
    # No preset, but layouts that the format has.
    Scheme("FP8_TENSOR", QuantArgs("e4m3", "tensor"), QuantArgs("e4m3", "token", dynamic=True)),
    Scheme("W8A8_TENSOR", QuantArgs("int8", "tensor"), QuantArgs("int8", "token", dynamic=True)),
]


@st.composite
def weights(draw: st.DrawFn) -> tuple[QuantizedWeight, Scheme, str]:
    """Any codes and scales at all, of any shape, with the scheme and the model's dtype."""
    scheme = draw(st.sampled_from(SCHEMES))
    dtype = draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    scheme = scheme.with_scale_dtype(FORMAT.scale_dtype(scheme, dtype))
    args = scheme.weights
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def random(low: int, high: int, shape: tuple[int, int]) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    scales = args.scale_shape((rows, columns))
    if args.is_float:
        codes = random(0, 255, (rows, columns)).to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        kind = torch.int8 if args.symmetric else torch.uint8
        codes = random(*args.code_range, (rows, columns)).to(kind)
    scale = torch.rand(scales, generator=generator) * 2.0 ** random(-10, 3, scales)
    scale = (scale + 2.0**-14).to(getattr(torch, args.scale_dtype)).float()
    zero = None if args.symmetric else random(0, 2**args.bits - 1, scales).to(torch.uint8)
    inputs = torch.rand(1, generator=generator) + 2.0**-14 if scheme.static_inputs else None
    return QuantizedWeight(codes, scale, zero, args, inputs), scheme, dtype


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    # Copies, as a tensor with a side of 1 may have strides that forbid views.
    a, b = (each.clone(memory_format=torch.contiguous_format) for each in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@settings(max_examples=300)
@given(weights())
def test_unpack_is_the_inverse_of_pack(drawn: tuple[QuantizedWeight, Scheme, str]) -> None:
    weight, scheme, dtype = drawn
    back = FORMAT.unpack(FORMAT.pack(weight, scheme, dtype), scheme)
    assert same(back.codes, weight.codes)
    assert same(back.scale, weight.scale)
    assert same(back.zero, weight.zero)
    assert same(back.input_scale, weight.input_scale)
    assert back.args == weight.args


@settings(max_examples=200)
@given(weights())
def test_layout_is_what_pack_gives(drawn: tuple[QuantizedWeight, Scheme, str]) -> None:
    weight, scheme, dtype = drawn
    rows, columns = weight.codes.shape
    planned = FORMAT.layout((rows, columns), scheme, dtype)
    packed = FORMAT.pack(weight, scheme, dtype)
    assert {name: (spec.dtype, spec.shape) for name, spec in planned.items()} == {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in packed.items()
    }
    assert all(tensor.is_contiguous() for tensor in packed.values())


@settings(max_examples=100)
@given(weights())
def test_neither_pack_nor_unpack_changes_its_input(
    drawn: tuple[QuantizedWeight, Scheme, str],
) -> None:
    weight, scheme, dtype = drawn
    before = replace(
        weight,
        codes=weight.codes.clone(),
        scale=weight.scale.clone(),
        zero=None if weight.zero is None else weight.zero.clone(),
    )
    packed = FORMAT.pack(weight, scheme, dtype)
    stored = {name: tensor.clone() for name, tensor in packed.items()}
    FORMAT.unpack(packed, scheme)
    assert same(weight.codes, before.codes)
    assert same(weight.scale, before.scale)
    assert same(weight.zero, before.zero)
    assert all(same(packed[name], stored[name]) for name in stored)


@settings(max_examples=200)
@given(weights())
def test_words_are_those_of_compressed_tensors(drawn: tuple[QuantizedWeight, Scheme, str]) -> None:
    weight, scheme, dtype = drawn
    packed = FORMAT.pack(weight, scheme, dtype)
    if "weight_packed" not in packed:
        return
    # compressed-tensors counts codes from the middle of the range, symmetric or not.
    middle = 0 if weight.args.symmetric else 2 ** (weight.args.bits - 1)
    signed = (weight.codes.int() - middle).to(torch.int8)
    assert same(packed["weight_packed"], pack_to_int32(signed, weight.args.bits))
    assert packed["weight_shape"].tolist() == list(weight.codes.shape)
    if weight.zero is not None:
        zero = (weight.zero.int() - middle).to(torch.int8)
        words = pack_to_int32(zero, weight.args.bits, packed_dim=0)
        assert same(packed["weight_zero_point"], words)


@settings(max_examples=100)
@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**32))
def test_words_are_read_as_compressed_tensors_reads_them(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    words = pack_words(codes, bits)
    theirs = unpack_from_int32(words, bits, torch.Size((rows, columns)))
    assert torch.equal(theirs.int() + 2 ** (bits - 1), codes.int())
    assert torch.equal(unpack_words(words, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_view_that_skips_elements_is_packed_as_its_copy(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (12, 40), generator=torch.Generator().manual_seed(0))
    whole = codes.to(torch.uint8)
    for view in (whole.T, whole[:, ::2], whole[::3], whole[:, 3:30]):
        words = pack_words(view, bits)
        assert torch.equal(words, pack_words(view.clone(), bits))
        assert torch.equal(unpack_words(words, bits, view.shape[1]), view)
