"""The kernels of rounding with gradients, interpreted, against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug import QuantArgs
from qplug.numerics.straight_through import round_in_range

GRIDS = {
    "int4": QuantArgs("int4", "group", 32),
    "int4, asymmetric": QuantArgs("int4", "group", 32, symmetric=False),
    "int8": QuantArgs("int8", "group", 32),
    "int8, asymmetric": QuantArgs("int8", "group", 32, symmetric=False),
    "int3": QuantArgs("int3", "group", 32),
    "int2, asymmetric": QuantArgs("int2", "group", 32, symmetric=False),
}

every_grid = pytest.mark.parametrize("grid", GRIDS)
symmetric_or_not = pytest.mark.parametrize("grid", ["int4", "int4, asymmetric"])


def weights(rows: int, width: int) -> Tensor:
    """Rows have both signs, but for the first ones, one row is zero, one has several extremes."""
    torch.manual_seed(0)
    weight = torch.randn(rows, width) * 0.02
    weight[0], weight[1], weight[2] = weight[0].abs(), -weight[1].abs(), 0
    weight[3] = weight[3].round(decimals=2)
    return weight


def assert_rounded_alike(
    weight: Tensor,
    args: QuantArgs,
    wanted: torch.dtype = torch.float32,
    *,
    least: float = 0.5,
    of_weight: bool = True,
) -> None:
    """``least``: the least part of a range that is kept; up to 0.6 more is."""
    from qplug.numerics.straight_through_kernel import round_in_range_on_gpu

    pull = torch.randn(weight.shape).bfloat16().float()
    of_scales = args.scale_shape(tuple(weight.shape))
    kept = [torch.rand(of_scales) * 0.6 + least for _ in range(1 if args.symmetric else 2)]
    found = []
    for rounded in (round_in_range, round_in_range_on_gpu):
        own = weight.detach().clone(memory_format=torch.preserve_format)
        given = [own.requires_grad_(of_weight), *(x.clone().requires_grad_() for x in kept)]
        made = rounded(given[0], given[1:], args, wanted)
        (made.float() * pull).sum().backward()
        grads = [x.grad for x in given if x.grad is not None]
        assert len(grads) == len(kept) + of_weight
        found.append([made.detach(), *grads])
    plain, by_kernel = found
    assert by_kernel[0].dtype == wanted
    plain[0] = plain[0].to(wanted)
    for one, other in zip(plain, by_kernel, strict=True):
        # Sums have another order, and what they add has either sign.
        assert torch.allclose(other, one, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


@symmetric_or_not
@pytest.mark.parametrize("size", [24, 32, 128, None])
@pytest.mark.parametrize("rows", [5, 130])
def test_rounding_and_its_gradients_are_those_of_plain_torch(
    rows: int, size: int | None, grid: str
) -> None:
    """Groups of 24 and rows of 264 are no powers of two; 130 rows are too many for one program."""
    strategy = "group" if size else "channel"
    args = replace(GRIDS[grid], strategy=strategy, group_size=size)
    assert_rounded_alike(weights(rows, 2 * size if size else 264), args)


@every_grid
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_rounding_to_each_grid_is_that_of_plain_torch(scale_dtype: str, grid: str) -> None:
    args = replace(GRIDS[grid], scale_dtype=scale_dtype)
    assert_rounded_alike(weights(6, 64), args)


@symmetric_or_not
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16])
def test_rounded_weights_have_the_wanted_dtype(wanted: torch.dtype, grid: str) -> None:
    assert_rounded_alike(weights(6, 64), GRIDS[grid], wanted)


@symmetric_or_not
def test_rows_longer_than_a_usual_tile_are_those_of_plain_torch(grid: str) -> None:
    args = replace(GRIDS[grid], strategy="channel", group_size=None)
    assert_rounded_alike(weights(4, 5000), args)


@symmetric_or_not
def test_a_weight_that_is_not_learned_has_no_gradient(grid: str) -> None:
    assert_rounded_alike(weights(6, 64), GRIDS[grid], of_weight=False)


@symmetric_or_not
def test_strided_weights_are_those_of_plain_torch(grid: str) -> None:
    weight = weights(6, 128)[:, ::2]
    assert not weight.is_contiguous()
    assert_rounded_alike(weight, GRIDS[grid])


@symmetric_or_not
def test_ranges_that_clip_nearly_all_are_those_of_plain_torch(grid: str) -> None:
    assert_rounded_alike(weights(6, 64), GRIDS[grid], least=0.01)


@symmetric_or_not
def test_tiny_weights_are_those_of_plain_torch(grid: str) -> None:
    """Scales of float16 are so coarse there that zero points are out of range, and are clipped."""
    args = replace(GRIDS[grid], scale_dtype="float16")
    assert_rounded_alike(weights(6, 64) * 2e-5, args)
