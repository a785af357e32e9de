"""The kernel that sums the errors of outputs, interpreted, against plain torch."""

from __future__ import annotations

import pytest
import torch

from qplug.numerics.losses import output_errors

#: Tiles have 128 rows and 128 columns, in steps of 64 channels; eight tiles of rows make a group.
SHAPES = [(1, 1, 24), (2, 70, 64), (3, 128, 128), (1, 130, 200), (2, 40, 384), (1, 1100, 260)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_outputs_are_those_of_plain_torch(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """The interpreter multiplies no bfloat16, so that the Gram matrices stay in float32."""
    from qplug.numerics.losses_kernel import output_errors_on_gpu

    torch.manual_seed(0)
    count, rows, width = shape
    inputs = torch.randn(count, 500, width) * torch.rand(count, 1, width) * 3 + 0.5
    gram = inputs.mT @ inputs
    difference = (torch.randn(count, rows, width) * 0.01).to(dtype)
    found = output_errors_on_gpu(difference, gram)
    assert found.dtype == torch.float64
    assert torch.allclose(found, output_errors(difference.float(), gram), rtol=1e-6)


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
