"""The kernel that sums the errors of outputs, interpreted, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qplug.numerics.losses import output_errors

#: Tiles have 128 rows and 128 columns, in steps of 64 channels; eight tiles of rows make a group.
SHAPES = [(1, 1, 24), (2, 70, 64), (3, 128, 128), (1, 130, 200), (2, 40, 384), (1, 1100, 260)]


def layers(count: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Differences of weights, and symmetric Gram matrices of inputs that have a mean."""
    torch.manual_seed(0)
    inputs = torch.randn(count, 500, width) * torch.rand(count, 1, width) * 3 + 0.5
    gram = inputs.mT @ inputs
    return torch.randn(count, rows, width) * 0.01, (gram + gram.mT) / 2


def assert_errors_are_exact(difference: Tensor, gram: Tensor) -> None:
    """The errors, but for sums in float32; all that is rounded to bfloat16 was so before."""
    from qplug.numerics.losses_kernel import output_errors_on_gpu

    found = output_errors_on_gpu(difference, gram)
    assert found.dtype == torch.float64
    wanted = ((difference.double() @ gram.double()) * difference.double()).sum((1, 2))
    assert torch.allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_errors_of_outputs_are_exact(
    dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int]
) -> None:
    difference, gram = layers(*shape)
    assert_errors_are_exact(difference.to(dtypes[0]), gram.to(dtypes[1]))


@pytest.mark.parametrize("shape", [(2, 70, 64), (1, 130, 600)])
def test_errors_of_outputs_are_exact_in_the_tiles_of_a_large_gpu(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qplug.numerics import losses_kernel

    monkeypatch.setattr(losses_kernel, "_NARROW", losses_kernel._COLUMNS)
    difference, gram = layers(*shape)
    assert_errors_are_exact(difference.bfloat16(), gram.bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_of_outputs_are_those_of_plain_torch(shape: tuple[int, int, int]) -> None:
    """And about the same if the kernel rounds differences to bfloat16, where the Gram matrix is."""
    from qplug.numerics.losses_kernel import output_errors_on_gpu

    difference, gram = layers(*shape)
    wanted = output_errors(difference, gram)
    assert torch.allclose(output_errors_on_gpu(difference, gram), wanted, rtol=1e-6)
    found = output_errors_on_gpu(difference, gram.bfloat16())
    assert torch.allclose(found, wanted, rtol=1e-2)


def test_errors_of_outputs_of_strided_tensors_are_those_of_plain_torch() -> None:
    """One Gram matrix for several matrices, and some of the rows of each."""
    from qplug.numerics.losses_kernel import output_errors_on_gpu

    torch.manual_seed(0)
    difference = torch.randn(3, 9, 96)[:, 4:]
    inputs = torch.randn(200, 96)
    gram = (inputs.T @ inputs).expand(3, 96, 96)
    assert not difference.is_contiguous()
    found = output_errors_on_gpu(difference, gram)
    assert torch.allclose(found, output_errors(difference, gram), rtol=1e-6)
