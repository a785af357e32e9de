"""Searched scales of four-bit floats, against a search of all codes in double precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qplug import Linear, QplugError, QuantArgs, preset
from qplug.api.groups import dequantize
from qplug.api.scheme import E8M0_SCALES
from qplug.numerics import (
    closest,
    global_scale_of,
    minmax_scale,
    nearest,
    search_clip,
    search_scale,
    stored_candidates,
)
from qplug.numerics import stored_scales as module

NVFP4, MXFP4 = preset("NVFP4A16").weights, preset("MXFP4A16").weights
FORMATS = {"NVFP4": NVFP4, "MXFP4": MXFP4}
every_format = pytest.mark.parametrize("name", FORMATS)

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: w,
    "heavy": lambda w: w * torch.exp(w),
    "flat": lambda w: torch.sigmoid(3 * w) - 0.5,
    "sparse": lambda w: w * (w.abs() > 1),
}


def drawn(rows: int, width: int, seed: int, kind: str = "normal", size: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return KINDS[kind](torch.randn(rows, width, generator=generator)) * size


def restored(groups: Tensor, scale: Tensor) -> Tensor:
    """``groups: [..., size]`` rounded to the grid under ``scale: [...]``, in double precision."""
    sizes = groups.double().abs()[..., None] / scale.double()[..., None, None]
    nearest_code = GRID[(sizes - GRID).abs().argmin(-1)]
    return nearest_code * scale.double()[..., None] * groups.double().sign()


def squared_error(groups: Tensor, scale: Tensor) -> Tensor:
    return (restored(groups, scale) - groups.double()).square().sum(-1)


def all_scales(linear: Linear) -> Tensor:
    """Every scale that the format can store, of those that are of the size of the weights."""
    if linear.args.scale_dtype == E8M0_SCALES:
        return 2.0 ** torch.arange(-40, 20, dtype=torch.float64)
    unit = global_scale_of(linear)
    assert unit is not None
    return E4M3 * unit.double()


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([1e-6, 0.02, 300.0]),
    st.integers(0, 2**20),
)
def test_scales_are_the_best_of_their_candidates(
    name: str, rows: int, groups: int, kind: str, size: float, seed: int
) -> None:
    args = FORMATS[name]
    assert args.group_size is not None
    weight = drawn(rows, groups * args.group_size, seed, kind, size)
    linear = Linear("linear", weight, args)
    search_scale(linear)
    assert linear.scale is not None
    assert linear.scale.shape == (rows, groups)
    parts = weight.unflatten(1, (-1, args.group_size))
    peaks = parts.abs().amax(2)
    candidates = torch.stack([*stored_candidates(peaks, args, global_scale_of(linear))])
    least = torch.stack([squared_error(parts, each) for each in candidates]).amin(0)
    found = squared_error(parts, linear.scale)
    assert (found <= least * (1 + 1e-5) + 1e-13 * peaks.double().square()).all()
    covering, _ = minmax_scale(weight, args)
    assert torch.equal(candidates[0], covering)
    assert (found <= squared_error(parts, covering) * (1 + 1e-5)).all()


@every_format
@pytest.mark.parametrize("kind", ["normal", "heavy", "flat"])
def test_candidates_are_all_that_matter(name: str, kind: str) -> None:
    """Of all scales that can be stored, no other makes the error of a tensor less by 1 in 1000."""
    args = FORMATS[name]
    assert args.group_size is not None
    linear = Linear("linear", drawn(16, 256, 3, kind), args)
    search_scale(linear)
    assert linear.scale is not None
    groups = linear.weight.unflatten(1, (-1, args.group_size))
    every = torch.stack(
        [squared_error(groups, s.expand(groups.shape[:2])) for s in all_scales(linear)]
    )
    found = squared_error(groups, linear.scale)
    assert float(found.sum()) <= float(every.amin(0).sum()) * 1.001


def test_the_error_falls() -> None:
    weight = drawn(64, 512, 0)
    errors = {}
    for name, args in FORMATS.items():
        linear = Linear("linear", weight, args)
        errors[name] = [
            float((dequantize(made) - weight).norm() / weight.norm())
            for made in (nearest(linear), closest(linear))
        ]
        assert linear.scale is None
    assert errors["NVFP4"][1] < 0.87 * errors["NVFP4"][0]
    assert errors["MXFP4"][1] < 0.998 * errors["MXFP4"][0]


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parts_of_a_weight_are_searched_alike(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = drawn(12, 192, 5).to(dtype)
    whole = closest(Linear("linear", weight, FORMATS[name]))
    monkeypatch.setattr(module, "_CHUNK", {"cpu": 100})
    apart = closest(Linear("linear", weight, FORMATS[name]))
    turned = closest(Linear("linear", weight.T.contiguous().T, FORMATS[name]))  # a view
    for made in (apart, turned):
        assert torch.equal(made.scale, whole.scale)
        assert torch.equal(made.codes.float(), whole.codes.float())


@every_format
def test_zeros_have_the_covering_scale(name: str) -> None:
    weight = drawn(4, 64, 1)
    weight[1] = 0
    made = closest(Linear("linear", weight, FORMATS[name]))
    assert torch.equal(made.scale[1], minmax_scale(weight, FORMATS[name])[0][1])
    assert not dequantize(made)[1].any()


def test_scales_that_were_chosen_are_kept() -> None:
    weight = drawn(4, 64, 1)
    linear = Linear("linear", weight, NVFP4, scale=minmax_scale(weight, NVFP4)[0] * 2)
    assert linear.scale is not None
    before = linear.scale.clone()
    search_scale(linear)
    assert torch.equal(linear.scale, before)


@pytest.mark.parametrize(
    "args", [QuantArgs("int4", "group", 16), QuantArgs("e2m1", "group", 16), preset("FP8").weights]
)
def test_other_formats_are_left_alone(args: QuantArgs) -> None:
    linear = Linear("linear", drawn(4, 64, 1), args)
    search_scale(linear)
    assert linear.scale is None
    assert torch.equal(closest(linear).codes.float(), nearest(linear).codes.float())


@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(name: str, bad: float) -> None:
    weight = drawn(4, 64, 1)
    weight[2, 3] = bad
    with pytest.raises(QplugError, match="NaN or infinite"):
        search_scale(Linear("linear", weight, FORMATS[name]))


@every_format
def test_the_gram_matrix_decides_where_it_is_known(name: str) -> None:
    """``(w - w') G (w - w')'`` of each group is the least of all candidates."""
    args = FORMATS[name]
    assert args.group_size is not None
    weight = drawn(20, 128, 7)
    mix = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    gram = mix @ mix.T
    linear = Linear("linear", weight, args)
    search_clip(linear, gram, steps=20, smallest=0.6)
    assert linear.scale is not None
    groups = weight.unflatten(1, (-1, args.group_size))
    tiles = torch.stack(
        [
            gram[at : at + args.group_size, at : at + args.group_size].double()
            for at in range(0, 128, args.group_size)
        ]
    )

    def loss(scale: Tensor) -> Tensor:
        off = restored(groups, scale) - groups.double()
        return torch.einsum("rgi,gij,rgj->rg", off, tiles, off)

    peaks = groups.abs().amax(2)
    candidates = [*stored_candidates(peaks, args, global_scale_of(linear))]
    least = torch.stack([loss(each) for each in candidates]).amin(0)
    assert torch.allclose(loss(linear.scale), least, rtol=1e-4, atol=1e-9)
    few = Linear("linear", weight, args)
    search_clip(few, gram, steps=1, smallest=0.6)
    assert few.scale is not None
    pair = torch.stack([loss(each) for each in candidates[:2]]).amin(0)
    assert torch.allclose(loss(few.scale), pair, rtol=1e-4, atol=1e-9)
