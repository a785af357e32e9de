"""The kernels of clipping, interpreted, against plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug import QuantArgs
from qplug.numerics.clipping import (
    clip_errors,
    diagonal_blocks,
    scaled_differences,
    unclipped_ratio,
)
from qplug.numerics.losses import output_errors
from qplug.numerics.scale_formats import SMALLEST
from qplug.numerics.scales import range_scale, weight_range

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
every_scale_dtype = pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
every_size = pytest.mark.parametrize("size", [32, 64, 128])
#: They fill no program's share; are one program's; go on in a second.
every_number_of_rows = pytest.mark.parametrize("rows", [3, 64, 70])


def layers(count: int, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Weights of two groups of ``size`` in a row, and Gram matrices of their inputs.

    Channels of the inputs differ in size. One group is zero, one has no weight below zero, and one
    none above.
    """
    torch.manual_seed(0)
    inputs = torch.randn(count, 400, 2 * size) * torch.rand(count, 1, 2 * size) * 3
    weight = torch.randn(count, rows, 2 * size) * 0.02
    weight[0, 0, :size] = 0
    weight[0, 1, :size] = weight[0, 1, :size].abs()
    weight[-1, -1, -size:] = -weight[-1, -1, -size:].abs()
    return weight, inputs.mT @ inputs


def candidates(
    weight: Tensor, args: QuantArgs, ratios: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of parts of the range of each group: ``[ratios, n * out, groups]``."""
    low, high = weight_range(weight.flatten(0, 1), args)
    found = [range_scale(low * ratio, high * ratio, args) for ratio in ratios]
    zeros = None if args.symmetric else torch.stack([z for _, z in found if z is not None])
    return torch.stack([scale for scale, _ in found]), zeros


def assert_errors_are_those_of_plain_torch(
    weight: Tensor, gram: Tensor, args: QuantArgs, ratios: Sequence[float]
) -> None:
    from qplug.numerics.clipping_kernel import clip_errors_on_gpu

    scales, zeros = candidates(weight, args, ratios)
    blocks = diagonal_blocks(gram, args.group_size or weight.shape[2])
    wanted = clip_errors(weight, scales, zeros, blocks, args)
    found = clip_errors_on_gpu(weight, scales, zeros, blocks, args)
    assert found.shape == wanted.shape
    # Codes are the same, which is why only the sums of float32 differ.
    assert ((found - wanted).abs() <= 1e-5 * wanted).all()


@symmetric_or_not
@every_size
@every_number_of_rows
def test_errors_of_clips_are_those_of_plain_torch(rows: int, size: int, grid: str) -> None:
    weight, gram = layers(2, rows, size)
    args = replace(GRIDS[grid], group_size=size)
    assert_errors_are_those_of_plain_torch(weight, gram, args, (1.07, 0.6))


@every_grid
@every_scale_dtype
def test_errors_of_clips_on_each_grid_are_those_of_plain_torch(scale_dtype: str, grid: str) -> None:
    weight, gram = layers(1, 5, 32)
    args = replace(GRIDS[grid], scale_dtype=scale_dtype)
    assert_errors_are_those_of_plain_torch(weight, gram, args, (1.07, 1, 0.6))


@symmetric_or_not
def test_errors_of_one_candidate_and_of_strided_weights_are_those_of_plain_torch(grid: str) -> None:
    """A part of the rows of three matrices: ``search_clips`` splits large ones so."""
    whole, gram = layers(3, 9, 32)
    weight = whole.split(4, dim=1)[1]
    assert not weight.is_contiguous()
    assert_errors_are_those_of_plain_torch(weight, gram, GRIDS[grid], (1,))


def assert_differences_are_those_of_plain_torch(
    weight: Tensor,
    scale: Tensor,
    gram: Tensor,
    args: QuantArgs,
    *,
    steps: int,
    products: torch.dtype = torch.float32,
) -> None:
    from qplug.numerics.clipping_kernel import scaled_difference_on_gpu

    assert args.group_size is not None
    blocks = diagonal_blocks(gram, args.group_size)
    wanted = scaled_differences(weight, args, scale, blocks, steps=steps, smallest=0.6)
    made = scaled_difference_on_gpu(
        weight,
        scale,
        blocks.to(products),
        args,
        steps=steps,
        largest=unclipped_ratio(args) if steps else 1.0,
        smallest=0.6,
        least=SMALLEST[args.scale_dtype],
    )
    assert made.dtype == torch.bfloat16
    found = made.float()
    assert torch.allclose(output_errors(found, gram), output_errors(wanted, gram), rtol=2e-2)
    # Equal but for bfloat16, save where a weight is half-way between two codes, or two clips are
    # about as good.
    close = torch.isclose(wanted, found, rtol=1e-2, atol=1e-5 * float(weight.abs().max()))
    assert close.float().mean() > 0.99


@symmetric_or_not
@every_size
@every_number_of_rows
def test_scaled_differences_are_those_of_plain_torch(rows: int, size: int, grid: str) -> None:
    weight, gram = layers(2, rows, size)
    scale = torch.rand(2, 2 * size) + 0.5
    args = replace(GRIDS[grid], group_size=size)
    assert_differences_are_those_of_plain_torch(weight, scale, gram, args, steps=2)


@every_grid
@every_scale_dtype
@pytest.mark.parametrize("steps", [0, 5])
def test_scaled_differences_on_each_grid_are_those_of_plain_torch(
    steps: int, scale_dtype: str, grid: str
) -> None:
    weight, gram = layers(1, 5, 32)
    scale = torch.rand(1, 64) + 0.5
    args = replace(GRIDS[grid], scale_dtype=scale_dtype)
    assert_differences_are_those_of_plain_torch(weight, scale, gram, args, steps=steps)


@symmetric_or_not
def test_scaled_differences_of_strided_tensors_are_those_of_plain_torch(grid: str) -> None:
    """One scale for three matrices: ``scaling_error`` expands it so."""
    whole, gram = layers(3, 9, 32)
    weight, scale = whole[:, 4:], (torch.rand(64) + 0.5).expand(3, 64)
    assert not weight.is_contiguous()
    assert not scale.is_contiguous()
    assert_differences_are_those_of_plain_torch(weight, scale, gram, GRIDS[grid], steps=3)


def test_scaled_differences_of_tiny_weights_are_those_of_plain_torch() -> None:
    """Scales of float16 are so coarse there that zero points are out of range, and are clipped."""
    weight, gram = layers(1, 20, 32)
    args = replace(GRIDS["int4, asymmetric"], scale_dtype="float16")
    scale = torch.rand(1, 64) + 0.5
    assert_differences_are_those_of_plain_torch(weight.abs() * -4e-5, scale, gram, args, steps=2)


@every_grid
@every_size
def test_scaled_differences_by_products_of_bfloat16_are_those_of_plain_torch(
    size: int, grid: str
) -> None:
    """GPUs that have such products compute them so."""
    weight, gram = layers(1, 40, size)
    scale = torch.rand(1, 2 * size) + 0.5
    args = replace(GRIDS[grid], group_size=size)
    products = torch.bfloat16
    assert_differences_are_those_of_plain_torch(
        weight, scale, gram, args, steps=5, products=products
    )
