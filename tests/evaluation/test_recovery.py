"""Recovery: the ratio of two scores, and its standard error against drawing items again."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from qplug.evaluation.recovery import Recovery, Score, recovery


def mean_score(items: list[float]) -> Score:
    return Score(statistics.fmean(items), None, tuple(items))


def drawn(rng: random.Random, count: int) -> tuple[Score, Score]:
    """Answers of two models that err on the same hard items, right 64 % and 56 % of the time."""
    base, quantized = [], []
    for _ in range(count):
        hard = rng.random()
        base.append(float(hard < 0.64))
        quantized.append(float(hard < 0.56 if rng.random() < 0.9 else rng.random() < 0.56))
    return mean_score(base), mean_score(quantized)


def test_the_paired_error_is_the_spread_of_the_ratio() -> None:
    rng = random.Random(0)
    found = [recovery(*drawn(rng, 400)) for _ in range(400)]
    kept = [one for one in found if one is not None]
    spread = statistics.stdev(one.value for one in kept)
    errors = [one.stderr for one in kept if one.stderr is not None]
    assert len(errors) == 400
    assert statistics.fmean(errors) == pytest.approx(spread, rel=0.1)
    assert all(one.paired for one in kept)


def test_equal_answers_have_no_error_and_independent_ones_more() -> None:
    base, quantized = drawn(random.Random(1), 300)
    assert recovery(base, base) == Recovery(1.0, 0.0, paired=True)
    alone = [
        Score(score.value, math.sqrt(score.value * (1 - score.value) / 300))
        for score in (base, quantized)
    ]
    paired, apart = recovery(base, quantized), recovery(*alone)
    assert paired is not None
    assert apart is not None
    assert (paired.value, paired.paired, apart.paired) == (apart.value, True, False)
    assert paired.stderr is not None
    assert apart.stderr is not None
    assert paired.stderr < 0.6 * apart.stderr


def test_what_cannot_be_known_is_none() -> None:
    assert recovery(Score(0.0), Score(0.5)) is None
    assert recovery(Score(2.0), Score(3.0, 0.1)) == Recovery(1.5, None, paired=False)
    assert recovery(mean_score([1.0]), mean_score([1.0])) == Recovery(1.0, None, paired=True)
    # A perplexity is no mean of its items' values.
    assert not Score(8.0, None, (1.0, 2.0)).is_mean
    # Scores of zero have a relative error all the same.
    assert recovery(Score(0.5, 0.1), Score(0.0, 0.05)) == Recovery(0.0, 0.1, paired=False)
