"""The kernel of GPTQ, interpreted, against plain torch."""

from __future__ import annotations

import pytest
import torch

from qplug import QuantArgs
from qplug.numerics.scales import minmax_scale
from qplug_gptq import solver

GRIDS = {
    "int4": QuantArgs("int4", "group", 16),
    "int4, asymmetric": QuantArgs("int4", "group", 16, symmetric=False),
    "int4, float16 scales": QuantArgs("int4", "group", 16, scale_dtype="float16"),
    "int3": QuantArgs("int3", "group", 16),
    "int2, asymmetric": QuantArgs("int2", "group", 16, symmetric=False),
    "int8, asymmetric": QuantArgs("int8", "group", 16, symmetric=False),
    "int8 channels": QuantArgs("int8", "channel"),
    "int8 tensor": QuantArgs("int8", "tensor"),
    "e4m3 channels": QuantArgs("e4m3", "channel"),
    "e4m3 tensor": QuantArgs("e4m3", "tensor"),
    "e4m3 blocks": QuantArgs("e4m3", "block", block=(16, 16)),
}


def assert_rounded_alike(
    args: QuantArgs, count: int, rows: int, width: int, columns: slice, *, strided: bool = False
) -> None:
    """Columns are a part of ``count`` matrices, in an order of their own, as ``solve`` has them.

    ``strided``: scales and zero points have rows one after another in memory, not columns.
    """
    from qplug_gptq.kernel import round_columns_on_gpu

    torch.manual_seed(0)
    inputs = torch.randn(count, 400, width) * torch.rand(count, 1, width) * 3
    weight = torch.randn(count, rows, width) * 0.02
    found = [minmax_scale(own, args) for own in weight]
    scale = torch.stack([scale for scale, _ in found])
    zero = None if args.symmetric else torch.stack([z for _, z in found if z is not None])
    order = torch.stack([torch.randperm(width) for _ in range(count)])
    factor, _ = solver.inverse_factor(inputs.mT @ inputs, order, 0.05)
    work = weight.mT.gather(1, order[:, :, None].expand(count, width, rows))[:, columns]
    scales, zeros = solver.column_scales(scale, zero, args, order[:, columns], rows)
    if strided:
        scales = scales.mT.contiguous().mT
        zeros = None if zeros is None else zeros.mT.contiguous().mT
    corner = factor[:, columns, columns]
    before = work.clone()
    on_gpu = round_columns_on_gpu(work, scales, zeros, corner, args)
    assert torch.equal(work, before)
    codes, errors = solver.round_columns(work.clone(), scales, zeros, corner, args)
    # All arithmetic is of single numbers, in one order.
    assert torch.equal(on_gpu[0], codes)
    assert torch.equal(on_gpu[1], errors)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_block_of_columns_is_rounded_to_the_same_codes(grid: str) -> None:
    """More rows than one program has; columns between others, whose number is no power of two."""
    assert_rounded_alike(GRIDS[grid], 2, 37, 48, slice(16, 28))


@pytest.mark.parametrize("rows", [1, 32, 33])
@pytest.mark.parametrize("columns", [1, 2, 15])
@pytest.mark.parametrize("grid", ["int4, asymmetric", "e4m3 channels"])
def test_blocks_of_any_size_are_rounded_to_the_same_codes(
    grid: str, columns: int, rows: int
) -> None:
    assert_rounded_alike(GRIDS[grid], 1, rows, 16, slice(0, columns))


def test_128_columns_are_rounded_to_the_same_codes() -> None:
    assert_rounded_alike(GRIDS["int4, asymmetric"], 1, 5, 128, slice(0, 128))


def test_scales_and_zero_points_may_be_strided() -> None:
    assert_rounded_alike(GRIDS["int4, asymmetric"], 2, 5, 16, slice(0, 16), strided=True)


@pytest.mark.parametrize("grid", ["int4", "int4, asymmetric"])
def test_weights_half_way_between_codes_get_the_same_codes(grid: str) -> None:
    """A quotient must be rounded as torch rounds it; the product with an inverse is another."""
    from qplug_gptq.kernel import round_columns_on_gpu

    torch.manual_seed(0)
    scales = torch.rand(1, 1, 320) + 0.01
    work = scales * (torch.arange(320) % 14 - 6.5)
    zeros = None if GRIDS[grid].symmetric else torch.full_like(scales, 8)
    given = (scales, zeros, torch.ones(1, 1, 1), GRIDS[grid])
    codes, errors = round_columns_on_gpu(work, *given)
    wanted_codes, wanted_errors = solver.round_columns(work.clone(), *given)
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(errors, wanted_errors)
