"""Weights that cannot be computed with are refused, read together or one by one."""

from __future__ import annotations

import pytest
import torch

from qplug.errors import QplugError
from qplug.model.parameters import refuse_infinite

EXPERTS = ("experts.0.weight", "experts.1.weight", "experts.2.weight")


@pytest.mark.parametrize("alike", [(), (EXPERTS,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_first_weight_that_is_not_finite_is_named(
    dtype: torch.dtype, alike: tuple[tuple[str, ...], ...]
) -> None:
    whole = torch.ones(3, 4, 5)
    whole[1:, 2, 3] = torch.nan
    tensors = {"norm.weight": torch.ones(5), **dict(zip(EXPERTS, whole.to(dtype), strict=True))}
    with pytest.raises(QplugError, match=r"^experts\.1\.weight: has NaN"):
        refuse_infinite(tensors, alike=alike)


def test_weights_of_several_shapes_are_read_one_by_one() -> None:
    tensors = {name: torch.ones(2, 3 + place) for place, name in enumerate(EXPERTS)}
    refuse_infinite(tensors, alike=(EXPERTS,))
    tensors[EXPERTS[2]][0, 0] = torch.inf
    with pytest.raises(QplugError, match=r"^experts\.2\.weight"):
        refuse_infinite({**tensors, "empty": torch.ones(0, 4)}, alike=(EXPERTS,))
