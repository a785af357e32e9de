"""Ranks layers by their errors, and finds those that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from qplug.report.findings import Layer

#: A layer stands out if its error is so many times the median of all layers.
FACTOR = 1.5
#: The most layers that are named as the worst.
COUNT = 5


def weight_error(layer: Layer) -> float | None:
    """Returns the relative error of the weight in qplug.json, or else from the files."""
    return layer.recomputed if layer.error is None else layer.error


def rank_error(layer: Layer) -> float | None:
    """Returns the error by which layers are ranked: of the output, or else of the weight."""
    return layer.loss if layer.loss is not None else weight_error(layer)


def ranked(layers: Sequence[Layer]) -> list[Layer]:
    """Returns ``layers``, the largest error first, and those without an error last."""
    return sorted(layers, key=lambda layer: -(rank_error(layer) or 0.0))


def typical(layers: Sequence[Layer]) -> float | None:
    """Returns the median error of ``layers``; None if no error is known."""
    known = [error for layer in layers if (error := rank_error(layer)) is not None]
    return median(known) if known else None


def standing_out(layers: Sequence[Layer]) -> list[Layer]:
    """Returns the layers whose error is ``FACTOR`` times the median or more, ``COUNT`` at most."""
    usual = typical(layers)
    if not usual:
        return []
    return [
        layer for layer in ranked(layers)[:COUNT] if (rank_error(layer) or 0.0) >= FACTOR * usual
    ]
