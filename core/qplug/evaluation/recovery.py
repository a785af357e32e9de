"""How much of a score a quantized model keeps, with the standard error of that share."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Largest difference between a score and the mean of its items for the score to be that mean.
_EQUAL = 1e-9


@dataclass(frozen=True)
class Score:
    """The score of a model in one task.

    ``stderr``: its standard error, None if unknown. ``items``: the score of each item, in an order
    that all models share, where the score is their mean; else empty.
    """

    value: float
    stderr: float | None = None
    items: tuple[float, ...] = ()

    @property
    def is_mean(self) -> bool:
        """Whether ``value`` is the mean of ``items``."""
        if not self.items:
            return False
        mean = math.fsum(self.items) / len(self.items)
        return math.isclose(mean, self.value, rel_tol=_EQUAL, abs_tol=_EQUAL)


@dataclass(frozen=True)
class Recovery:
    """The score of a quantized model divided by the float model's.

    ``stderr``: the standard error of ``value``, None if unknown. ``paired``: whether the standard
    error comes from the differences item by item.
    """

    value: float
    stderr: float | None
    paired: bool


def recovery(base: Score, quantized: Score) -> Recovery | None:
    """Returns the share of ``base`` that ``quantized`` keeps; None if ``base`` is zero.

    Both models answer the same items, so their errors are alike. Where both scores are means over
    items, the standard error of the ratio ``r = q / b`` is that of the mean of the residuals
    ``(q_i - r b_i) / b`` (Cochran, Sampling Techniques, 1977, equation 2.46), which takes the
    likeness into account. Elsewhere it is the delta method's for independent scores,
    ``r sqrt((s_q / q)^2 + (s_b / b)^2)``, which is too large for models that are alike.
    """
    if base.value == 0:
        return None
    ratio = quantized.value / base.value
    if base.is_mean and quantized.is_mean and len(base.items) == len(quantized.items):
        return Recovery(ratio, _paired_error(base, quantized, ratio), paired=True)
    if base.stderr is None or quantized.stderr is None:
        return Recovery(ratio, None, paired=False)
    # r s_q / q = s_q / b, which is defined for q = 0 too.
    error = math.hypot(quantized.stderr / base.value, ratio * base.stderr / base.value)
    return Recovery(ratio, error, paired=False)


def _paired_error(base: Score, quantized: Score, ratio: float) -> float | None:
    count = len(base.items)
    if count < 2:
        return None
    pairs = zip(quantized.items, base.items, strict=True)
    residuals = [(q - ratio * b) / base.value for q, b in pairs]  # their mean is 0
    return math.sqrt(math.fsum(r * r for r in residuals) / (count - 1) / count)
