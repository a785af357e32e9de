"""The kernel of extremes and sums of channels, interpreted, against plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from qplug.calibration.channels import Channels

EVERY_DTYPE = [torch.bfloat16, torch.float16, torch.float32]
CPU = torch.device("cpu")


def rows_of(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(count, width) * torch.rand(width)).to(dtype)


def added(x: Tensor, cuts: Sequence[int] | None = None, *, times: int = 1) -> Channels:
    """What the kernel makes of the rows ``x``, which ``cuts`` divides among tensors."""
    from qplug.calibration.channels_kernel import add_on_gpu

    known = Channels.of_no_rows(1 if cuts is None else len(cuts) - 1, x.shape[1], CPU)
    starts = None if cuts is None else torch.tensor(cuts)
    for _ in range(times):
        add_on_gpu(x, starts, known.low, known.high, known.total, known.absolute)
    return known


def plain(x: Tensor, *, times: int = 1) -> Channels:
    known = Channels.of_no_rows(1, x.shape[1], CPU)
    for _ in range(times):
        known.add(x)
    return known


def assert_alike(found: Channels, wanted: Channels) -> None:
    assert torch.equal(found.low, wanted.low)
    assert torch.equal(found.high, wanted.high)
    rounding = 1e-6 * wanted.absolute
    assert ((found.total - wanted.total).abs() <= rounding).all()
    assert ((found.absolute - wanted.absolute).abs() <= rounding).all()


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("width", [1, 16, 40])
def test_extremes_and_sums_of_channels_are_those_of_plain_torch(
    width: int, dtype: torch.dtype
) -> None:
    """Four tensors in a row, of which the second has no rows; twice the same rows."""
    cuts = [0, 100, 100, 164, 333]
    x = rows_of(333, width, dtype)
    known = added(x, cuts, times=2)
    for number in range(4):
        wanted = plain(x[cuts[number] : cuts[number + 1]], times=2)
        assert_alike(known.one(number), wanted)


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("count", [1, 64, 70])
def test_the_only_tensor_has_all_rows(count: int, dtype: torch.dtype) -> None:
    x = rows_of(count, 20, dtype)
    assert_alike(added(x, times=2), plain(x, times=2))


@pytest.mark.parametrize("cuts", [None, [0, 30, 70]])
def test_rows_may_be_a_part_of_wider_ones_and_columns_may_be_contiguous(
    cuts: list[int] | None,
) -> None:
    for x in (rows_of(70, 50)[:, 3:23], rows_of(20, 70).T):
        assert not x.is_contiguous()
        known = added(x, cuts)
        for number, start in enumerate((cuts or [0])[:2]):
            assert_alike(known.one(number), plain(x[start : (cuts or [0, 70])[number + 1]]))


@pytest.mark.parametrize("cuts", [None, [0, 80, 200]])
def test_channels_keep_what_is_not_finite(cuts: list[int] | None) -> None:
    """NaN, infinities of one sign and of both, and values whose sum is infinite; one is finite."""
    x = torch.ones(200, 6)
    x[3, 0], x[4, 1], x[90, 1], x[5, 2] = torch.nan, torch.inf, torch.inf, -torch.inf
    x[7, 3], x[6, 3], x[71, 3] = torch.inf, -torch.inf, -torch.inf
    x[2:66:2, 4], x[3:67:2, 4], x[70:134, 4] = 3e38, -3e38, 3e38
    with np.errstate(over="ignore", invalid="ignore"):  # the interpreter computes with NumPy
        known = added(x, cuts)
    for number, start in enumerate((cuts or [0])[:2]):
        wanted = plain(x[start : (cuts or [0, 200])[number + 1]])
        for part in ("low", "high"):
            found = getattr(known.one(number), part)
            assert torch.allclose(found, getattr(wanted, part), rtol=0, equal_nan=True)
        for part in ("total", "absolute"):
            finite = getattr(known.one(number), part).isfinite()
            assert torch.equal(finite, getattr(wanted, part).isfinite())
