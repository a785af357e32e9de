"""A run without calibration data: one tensor at a time, the next read while this one is rounded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

from qplug.run.steps import Finished, Steps


def streamed(steps: Steps, done: Collection[int]) -> Iterator[Finished]:
    """Every step that is not ``done``, in order.

    No step needs another, and most of the time goes into files, so the first process does all.
    """
    if not steps.session.processes.is_first:
        return
    left = [number for number in range(len(steps.plan.steps)) if number not in done]
    with ThreadPoolExecutor(1, "qplug-reader") as reader:
        reading = reader.submit(steps.weights, steps.plan.steps[left[0]]) if left else None
        for number, after in zip_longest(left, left[1:]):
            assert reading is not None
            with steps.session.clock("reading"):
                weights = reading.result()
            if after is not None:
                reading = reader.submit(steps.weights, steps.plan.steps[after])
            if weights:
                yield steps.quantized(number, weights, steps.stages.quantize)
            else:
                yield steps.copied(number)
