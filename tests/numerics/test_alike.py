"""Experts are worked on side by side, and divided evenly among processes."""

from __future__ import annotations

import pytest
import torch

from qplug import InputGroup, Linear, QuantArgs
from qplug.machine.processes import shares_of
from qplug.numerics import side_by_side

INT4 = QuantArgs("int4", "group", 16)


def expert(number: int, width: int, rows: int) -> InputGroup:
    """A group of one linear of an expert that saw tokens."""
    channels = torch.ones(width)
    linear = Linear(f"experts.{number}.up_proj", torch.zeros(rows, width), INT4)
    return InputGroup(
        (linear,),
        gram=torch.eye(width),
        mean=channels,
        mean_abs=channels,
        low=-channels,
        high=channels,
        sample=torch.ones(1, width),
        tokens=4,
        scalable=False,
        shiftable=False,
        after_norm=False,
    )


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 5, 24, 128])
def test_each_process_has_about_as_many_experts(count: int, processes: int) -> None:
    groups = [expert(number, 32, 48) for number in range(count)]
    lists = side_by_side(groups, processes)
    assert [group for alike in lists for group in alike] == groups
    assert len(lists) == min(count, processes)
    shares = shares_of([float(len(alike)) for alike in lists], processes)
    experts = [sum(len(lists[number]) for number in share) for share in shares]
    assert max(experts) == -(-count // processes)


def test_lists_have_no_more_than_are_worked_on_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qplug.numerics.alike.ROOM", {"cpu": 10 * 32 * 48})
    groups = [expert(number, 32, 48) for number in range(42)]
    assert [len(alike) for alike in side_by_side(groups)] == [10, 10, 10, 10, 2]
    assert sorted(len(alike) for alike in side_by_side(groups, 4)) == [5, 5, 5, 5, 5, 5, 6, 6]


def test_neighbours_that_differ_are_in_different_lists() -> None:
    groups = [expert(0, 32, 48), expert(1, 32, 48), expert(2, 48, 32), expert(3, 32, 48)]
    assert [len(alike) for alike in side_by_side(groups)] == [2, 1, 1]
