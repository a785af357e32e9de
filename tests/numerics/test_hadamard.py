"""Hadamard matrices are exact, and the transform multiplies by them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qplug import QplugError
from qplug.numerics.hadamard import factors, hadamard_exists, hadamard_matrix, hadamard_transform

#: Orders that no power of two times a smaller one gives.
RULES = (
    *(12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 92, 100, 108, 116, 124, 132, 140, 148, 156, 164),
    *(172, 180, 196, 204, 212, 220, 228, 244, 252, 260, 276, 284, 292, 300, 308, 316, 332, 340),
    *(348, 364, 372, 380, 388, 396, 420, 444, 460, 468, 476, 484, 492, 500, 924),
)
#: Hidden and inner widths of models that people use.
WIDTHS = (
    *(384, 576, 768, 896, 1024, 1152, 1536, 2048, 2304, 2560, 2816, 2880, 3072, 3584, 3840, 4096),
    *(4864, 5120, 5376, 5632, 6144, 6656, 6912, 7168, 8192, 8960, 9728, 10240, 11008, 12288, 13824),
    *(14336, 16384, 17920, 18432, 18944, 22016, 25600, 27648, 28672, 29568, 53248),
)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 16, 32, 64, 40, 56, 72, *RULES])
def test_matrices_are_exact(order: int) -> None:
    made = hadamard_matrix(order)
    assert made.shape == (order, order)
    assert (np.abs(made) == 1).all()
    assert (made @ made.T == order * np.eye(order, dtype=np.int64)).all()


def row(order: int, index: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Row ``index`` of a matrix too large to be written down."""
    made = np.ones(1, np.int64)
    for factor in reversed(factors(order)):
        index, digit = divmod(index, factor)
        made = np.kron(hadamard_matrix(factor)[digit], made)
    return made


@pytest.mark.parametrize("base", [1, *(order for order in RULES if order <= 172)])
def test_every_power_of_two_times_a_rule(base: int) -> None:
    for power in range(3, 10):
        order = base << power
        assert math.prod(factors(order)) == order
        one, other = row(order, order // 3), row(order, order - 2)
        assert (one @ one, one @ other) == (order, 0)
        x = torch.zeros(1, order, dtype=torch.float64)
        x[0, order // 3] = math.sqrt(order)
        assert torch.equal(hadamard_transform(x).round().long()[0], torch.from_numpy(one))


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_models(width: int) -> None:
    assert hadamard_exists(width)
    assert math.prod(factors(width)) == width


@pytest.mark.parametrize("order", [3, 5, 6, 10, 14, 18, 22, 188, 376, 4 * 167, 2 * 1001])
def test_no_rule(order: int) -> None:
    assert not hadamard_exists(order)
    with pytest.raises(QplugError, match=f"no rule gives a Hadamard matrix of order {order}"):
        hadamard_matrix(order)
    with pytest.raises(QplugError, match="no rule"):
        hadamard_transform(torch.zeros(2, order))


@settings(max_examples=60)
@given(
    st.sampled_from([1, 2, 4, 8, 12, 20, 24, 40, 48, 64, 92, 96, 128, 144, 160, 384, 400, 448]),
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**20),
)
def test_the_transform_multiplies(
    order: int, shape: list[int], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, order, generator=generator, dtype=dtype)
    found = hadamard_transform(x)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    wanted = x.double() @ torch.from_numpy(hadamard_matrix(order)).double() / math.sqrt(order)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
