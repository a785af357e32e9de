"""Runs without calibration data: rounds one tensor while the next one is read from disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

from qplug.run.steps import Finished, Steps


def streamed(steps: Steps, done: Collection[int]) -> Iterator[Finished]:
    """Yields every step that is not ``done``, in order, computed.

    The first process does all the work, since most of the time goes into reading and writing.
    """
    if not steps.session.processes.is_first:
        return
    todo = [number for number in range(len(steps.plan.steps)) if number not in done]
    with ThreadPoolExecutor(1, "qplug-reader") as reader:
        reading = reader.submit(steps.weights, steps.plan.steps[todo[0]]) if todo else None
        for number, following in zip_longest(todo, todo[1:]):
            assert reading is not None
            with steps.session.clock("reading"):
                weights = reading.result()
            if following is not None:
                reading = reader.submit(steps.weights, steps.plan.steps[following])
            if weights:
                yield steps.quantized(number, weights, steps.stages.quantize)
            else:
                yield steps.copied(number)
