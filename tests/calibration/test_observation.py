from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from qplug.calibration.observation import Observation, SampleQuota, Seen
from qplug.model.input_groups import GroupPaths
from qplug.recipe.spellings import parse_scheme


class Catching(nn.Module):
    """A block that catches what is raised in it and keeps it, as wrappers of modules do."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.seen = seen

    def forward(self, x: Tensor) -> Any:
        large = x * 2
        self.seen.append(weakref.ref(large))
        try:
            return self.linear(large)
        except Exception as error:
            kept = [error]
            raise kept[0] from None


def test_a_pass_that_was_ended_leaves_no_tensor() -> None:
    seen: list[Any] = []
    block = Catching(seen)
    observation = Observation(
        block,
        (GroupPaths(("linear",), None, "linear"),),
        {"linear": parse_scheme("W4A16", -1)},
        SampleQuota([1], 0),
        torch.device("cpu"),
        with_drift=False,
    )

    def observe() -> None:
        given = torch.ones(1, 4, 8)
        seen.append(weakref.ref(given))
        with observation.gathering(Seen(1, 4, None, None), {}, stop=True):
            block(given)

    gc.collect()
    gc.disable()
    try:
        observe()
        assert [tensor() for tensor in seen] == [None, None]
    finally:
        gc.enable()
    assert observation.statistics["linear"].tokens == 4
