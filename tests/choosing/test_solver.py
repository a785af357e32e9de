"""The solver finds what a search through all choices finds, and its bound is no higher."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qplug.choosing.solver import cheapest

CANDIDATE = st.tuples(st.integers(0, 40).map(lambda n: n / 8192), st.integers(0, 30))
DECISIONS = st.lists(st.lists(CANDIDATE, min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=40)
@given(DECISIONS, st.integers(0, 100))
def test_as_good_as_the_best_of_all_choices(
    options: list[list[tuple[float, int]]], limit: int
) -> None:
    costs = [[cost for cost, _ in each] for each in options]
    weights = [[weight for _, weight in each] for each in options]
    within = [
        sum(cost for cost, _ in choice)
        for choice in product(*options)
        if sum(weight for _, weight in choice) <= limit
    ]
    found = cheapest(costs, weights, limit)
    if not within:
        assert found is None
        return
    assert found is not None
    assert found.weight == sum(w[n] for w, n in zip(weights, found.choices, strict=True)) <= limit
    assert found.cost == pytest.approx(min(within), abs=1e-12)
    assert found.bound <= found.cost
    assert found.bound == pytest.approx(found.cost, abs=1e-8)


def test_a_limit_in_bytes_of_a_large_model_is_held_to_the_byte() -> None:
    random = Random(0)
    sizes = (117_440_512, 469_762_048, 234_881_024)  # weights of the layers of a 70B model
    costs, weights = [], []
    for number in range(240):
        scale = random.lognormvariate(-8, 1)
        bits = (4.0, 4.125, 4.25, 4.5, 8.125, 16.0)
        costs.append([scale * 4.0**-each for each in bits])
        weights.append([int(sizes[number % 3] * each / 8) + 8 for each in bits])
    for limit in (34_000_000_001, 40_000_000_000, 40_000_000_007):
        found = cheapest(costs, weights, limit)
        assert found is not None
        assert found.weight <= limit
        assert found.bound <= found.cost <= found.bound * (1 + 1e-4)


def test_tiny_costs_are_not_below_the_tolerances_of_the_solver() -> None:
    costs = [[3e-12, 1e-12], [5e-12, 1e-12]]
    found = cheapest(costs, [[1, 2], [1, 2]], 3)
    assert found is not None
    assert found.choices == (0, 1)
