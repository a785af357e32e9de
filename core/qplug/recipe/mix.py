"""Mixes of datasets: ``a:64+b:64`` takes 64 samples of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qplug.errors import QplugError

#: One part of a mix: ``LABEL=DATASET:SAMPLES``, where label and samples may be left out.
_PART = re.compile(r"(?:(?P<label>[^=:+]+)=)?(?P<dataset>[^=:+]+)(?::(?P<count>\d{1,12}))?")


@dataclass(frozen=True)
class Share:
    """A part of the calibration samples: ``count`` of them come from ``dataset``.

    ``options`` are the options of the dataset by name.
    """

    dataset: str
    count: int
    options: Mapping[str, Any]


def shares_of(mix: str, options: Mapping[str, Any], samples: int) -> tuple[Share, ...]:
    """Returns the datasets in ``mix``, each with its number of the ``samples``, in order.

    A mix is one dataset, or several as in ``text:96+pileval:32`` or ``chats=text:96+code=text:32``.
    Datasets without a number share the rest equally. Options of a mix go by
    ``DATASET.OPTION``, or ``LABEL.OPTION`` for a dataset with a label. Raises QplugError if the mix
    or its options are written in another way, or if the numbers do not add up to ``samples``.
    """
    parts = [_PART.fullmatch(part.strip()) for part in mix.split("+")]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        raise QplugError(f"--dataset {mix}: write one dataset, or several as in text:96+pileval:32")
    counts = _counts(mix, [part["count"] for part in found], samples)
    if len(found) == 1 and found[0]["label"] is None:
        return (Share(found[0]["dataset"], samples, options),)
    labels = [part["label"] or part["dataset"] for part in found]
    if len(set(labels)) < len(labels):
        raise QplugError(f"--dataset {mix}: give equal datasets labels, as in a=text:64+b=text:64")
    own: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for name, value in options.items():
        label, dot, option = name.partition(".")
        if not dot or label not in own:
            known = ", ".join(f"{label}.{option or name}" for label in labels)
            raise QplugError(f"--dataset-opt {name}: say whose option it is: {known}")
        own[label][option] = value
    return tuple(
        Share(part["dataset"], count, own[label])
        for part, count, label in zip(found, counts, labels, strict=True)
    )


def _counts(mix: str, given: list[str | None], samples: int) -> list[int]:
    """Returns the number of samples of each dataset; those without a number share the rest."""
    total = sum(int(count) for count in given if count is not None)
    open_ones = sum(count is None for count in given)
    rest = samples - total
    if 0 in [int(count or 1) for count in given] or (rest if not open_ones else rest < open_ones):
        needed = "add up to" if not open_ones else "leave some of"
        raise QplugError(
            f"--dataset {mix}: its numbers must be 1 or more and {needed} --samples {samples}"
        )
    shared = iter(
        rest // max(1, open_ones) + (n < rest % max(1, open_ones)) for n in range(open_ones)
    )
    return [next(shared) if count is None else int(count) for count in given]
