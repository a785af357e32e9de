"""Chooses one candidate for each decision so that a sum is least and another within a limit.

This is the multiple-choice knapsack problem. HiGHS solves it as an integer program, to a relative
gap of 1e-5, and gives a bound below which no choice lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: The largest cost that HiGHS is given: its tolerances are absolute, 1e-6.
_LARGEST = 1e6
#: The gap at which HiGHS stops, and the seconds after which it returns the best choice by then.
_GAP, _SECONDS = 1e-5, 30.0


@dataclass(frozen=True)
class Solution:
    """A choice for each decision, by number of the candidate, and what it costs.

    ``cost`` and ``weight`` are the sums over decisions. No choice within the limit has a cost below
    ``bound``.
    """

    choices: tuple[int, ...]
    cost: float
    weight: float
    bound: float


def cheapest(
    costs: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], limit: float
) -> Solution | None:
    """The choice of the least cost whose weight is at most ``limit``; None if there is none.

    ``costs`` and ``weights``: of each candidate of each decision.
    """
    if sum(min(each) for each in weights) > limit:
        return None
    kept = [_undominated(c, w) for c, w in zip(costs, weights, strict=True)]
    allowed = limit
    while True:
        found = _solved(costs, weights, kept, allowed)
        if found is None or found.weight <= limit:
            return found
        allowed -= found.weight - limit  # the solver's tolerance let it through


def _undominated(costs: Sequence[float], weights: Sequence[float]) -> list[int]:
    """The numbers of candidates than which no other is better in one sum and as good in the other.

    Of equal candidates the first is kept.
    """
    order = sorted(range(len(costs)), key=lambda n: (weights[n], costs[n], n))
    kept: list[int] = []
    for number in order:
        if not kept or costs[number] < costs[kept[-1]]:
            kept.append(number)
    return kept


def _solved(
    costs: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
    kept: Sequence[Sequence[int]],
    limit: float,
) -> Solution | None:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    pairs = [(d, n) for d, numbers in enumerate(kept) for n in numbers]
    # What every choice pays at least is left out: tolerances are relative to what is left.
    base_cost = math.fsum(min(costs[d][n] for n in numbers) for d, numbers in enumerate(kept))
    base_weight = math.fsum(min(weights[d][n] for n in numbers) for d, numbers in enumerate(kept))
    extra = np.array([costs[d][n] - min(costs[d][m] for m in kept[d]) for d, n in pairs])
    heavy = np.array([weights[d][n] - min(weights[d][m] for m in kept[d]) for d, n in pairs])
    unit = max(extra.max(initial=0.0) / _LARGEST, 1e-300)
    room = limit - base_weight
    load = max(heavy.max(initial=0.0), 1e-300)
    rows = csr_array(
        (np.ones(len(pairs)), ([d for d, _ in pairs], range(len(pairs)))),
        shape=(len(kept), len(pairs)),
    )
    result = milp(
        extra / unit,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(rows, 1, 1),
            LinearConstraint((heavy / load)[None, :], -np.inf, room / load),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if result.x is None:
        return None
    taken = {d: n for (d, n), value in zip(pairs, result.x, strict=True) if value > 0.5}
    choices = tuple(taken[d] for d in range(len(kept)))
    cost = math.fsum(costs[d][n] for d, n in enumerate(choices))
    bound = base_cost + float(result.mip_dual_bound) * unit
    return Solution(
        choices,
        cost,
        math.fsum(weights[d][n] for d, n in enumerate(choices)),
        min(bound, cost),
    )
