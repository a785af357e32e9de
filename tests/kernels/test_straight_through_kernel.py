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
    """Rows have both signs, but for the first ones, of which one is zero and one has a zero.

    One has several extremes.
    """
    torch.manual_seed(0)
    weight = torch.randn(rows, width) * 0.02
    weight[0], weight[1], weight[2] = weight[0].abs(), -weight[1].abs(), 0
    weight[0, 5] = 0
    weight[3] = weight[3].round(decimals=2)
    return weight


def assert_rounded_alike(
    weight: Tensor,
    args: QuantArgs,
    wanted: torch.dtype = torch.float32,
    *,
    kept: tuple[float, float] = (0.5, 1.1),
    of_weight: bool = True,
    strided: bool = False,
) -> None:
    """``kept``: the least and the greatest part of a range that is kept.

    ``strided``: weights and parts have columns one after another in memory, not rows.
    """
    from qplug.numerics.straight_through_kernel import round_in_range_on_gpu

    pull = torch.randn(weight.shape[::-1]).bfloat16().float().T  # so is the gradient: strided
    of_scales = args.scale_shape(tuple(weight.shape))
    parts = [torch.empty(of_scales).uniform_(*kept) for _ in range(1 if args.symmetric else 2)]
    if strided:
        weight, *parts = (x.T.contiguous().T for x in (weight, *parts))
    found = []
    for rounded in (round_in_range, round_in_range_on_gpu):
        given = [weight.clone().requires_grad_(of_weight)]
        given += [part.clone().requires_grad_() for part in parts]
        assert not any(x.is_contiguous() == strided for x in given)
        made = rounded(given[0], given[1:], args, wanted)
        (made.float() * pull).sum().backward()
        grads = [x.grad for x in given if x.grad is not None]
        assert len(grads) == len(parts) + of_weight
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
def test_strided_weights_and_parts_are_those_of_plain_torch(grid: str) -> None:
    assert_rounded_alike(weights(6, 64), GRIDS[grid], strided=True)


@symmetric_or_not
def test_ranges_that_clip_nearly_all_are_those_of_plain_torch(grid: str) -> None:
    assert_rounded_alike(weights(6, 64), GRIDS[grid], kept=(0.01, 0.6))


@symmetric_or_not
def test_tiny_weights_are_those_of_plain_torch(grid: str) -> None:
    """Scales of float16 are so coarse there that zero points are out of range, and are clipped."""
    args = replace(GRIDS[grid], scale_dtype="float16")
    assert_rounded_alike(weights(6, 64).abs() * -4e-5, args)


@symmetric_or_not
def test_weights_half_way_between_codes_are_those_of_plain_torch(grid: str) -> None:
    """A quotient of 2.5 must be exact: a product with the inverse of a scale may not be."""
    args = replace(GRIDS[grid], scale_dtype="bfloat16")
    scales = torch.linspace(0.01, 0.03, 100).bfloat16().float()
    weight = (scales[:, None] * torch.arange(-7.5, 8)).repeat(1, 2)
    assert_rounded_alike(weight, args, kept=(1, 1))
