"""Equal masks and tables of several batches take the memory of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qplug.calibration import shared_tensors
from qplug.calibration.shared_tensors import SharedTensors
from qplug.calibration.walk import Walk

Family = Callable[..., Path]
StartWalk = Callable[..., Walk]
MakeTokens = Callable[..., Tensor]


def test_equal_tensors_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_tensors, "_LEAST", 16)
    one, same, view = torch.ones(4), torch.ones(4), torch.ones(1, 4).expand(3, 4)
    again, base = torch.ones(1, 4), torch.zeros(4)
    other, small = torch.ones(4, dtype=torch.float64), torch.ones(3)
    shared = SharedTensors()
    shared.share([one, view, base, other, small])
    shared.share([same, (expanded := again.expand(3, 4))])
    assert same.data_ptr() == one.data_ptr()
    assert again.data_ptr() == expanded.data_ptr() == view.data_ptr()
    different = {tensor.data_ptr() for tensor in (one, view, base, other, small)}
    assert len(different) == 5
    assert torch.equal(expanded, torch.ones(3, 4))


def test_batches_of_a_walk_share_masks_and_tables(
    family: Family, start_walk: StartWalk, make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = make_tokens(3, 20)
    alone = start_walk(family("gemma2"), tokens, batch_size=1).gather("model.layers.0")
    monkeypatch.setattr(shared_tensors, "_LEAST", 1)
    walk = start_walk(family("gemma2"), tokens, batch_size=1)
    first, *others = ([t.data_ptr() for t in call.others()] for call in walk._stream.calls)
    assert first
    assert others == [first, first]
    for own, group in zip(walk.gather("model.layers.0").groups, alone.groups, strict=True):
        assert torch.equal(own.gram, group.gram)
