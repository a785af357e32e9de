"""Watches the blocks of a calibrated run: one that is too far off stops the run, or is raised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qplug.api.events import RaisedBlock
from qplug.calibration.ranges import four_digits
from qplug.errors import QplugError
from qplug.output.plan import Step
from qplug.run.planned import PlannedRun
from qplug.run.stop_at import Limit, StopAt


class BlockWatch:
    """Compares the distance after each block with ``limit``; see ``Limit``.

    ``run`` is the run as it is planned now, with the blocks that are raised. ``raising`` is this
    object if blocks are raised, else None.
    """

    def __init__(self, limit: Limit, run: PlannedRun) -> None:
        self._limit, self.run = limit, run
        self._stop = StopAt(limit, run.stages, run.plan, run.prepared.view)

    @property
    def raising(self) -> BlockWatch | None:
        """This object if blocks above the limit are raised, else None."""
        return self if self._limit.raises else None

    def computed(self, step: Step, distance: float) -> None:
        """Takes the distance after ``step``, which this run has computed.

        Raises KeptError if it is above the limit.
        """
        self._stop(step, distance)

    def finished_before(self, step: Step, distance: float) -> None:
        """Takes the distance after ``step``, which an earlier run has finished.

        Raises KeptError if it is above the limit.
        """
        if self._limit.raises:
            self._stop.refuse_finished(step, distance)
        else:
            self._stop(step, distance)

    def attempt(self, step: Step) -> Attempt:
        """Returns the attempt to bring the block ``step`` within the limit."""
        return Attempt(self, step, self._limit, self._stop)


class Attempt:
    """Raises one block level by level until it is within the limit.

    ``raised`` is the block at the level that was tried last, None at its own schemes.
    """

    def __init__(self, watch: BlockWatch, step: Step, limit: Limit, stop: StopAt) -> None:
        raising = watch.run.raising
        assert raising is not None
        self._watch, self._step, self._limit, self._stop = watch, step, limit, stop
        self._raising = raising
        #: A run that was killed may have raised the block, and not finished it.
        earlier = next((block for block in raising.raised if block.name == step.name), None)
        self._distances = [] if earlier is None else [*earlier.distances[:-1]]
        self.raised: RaisedBlock | None = None

    def next_run(self, distance: float) -> PlannedRun | None:
        """Returns the run in which the block is raised one level more; None if it need not be.

        ``distance`` is the one under the schemes of the last run. Raises KeptError if there is no
        level left.
        """
        self._distances.append(_known(distance))
        if self._limit.is_kept(distance):
            if self.raised is not None:
                self._settle(self._tried(self._distances))
            return None
        if len(self._distances) > len(self._raising.levels(self._step.name)):
            raise self._stop.refused_at_highest(self._step, self._tried(self._distances))
        higher = self._tried([*self._distances, None])  # its distance is not known yet
        try:
            self._watch.run = self._watch.run.with_raised(self._with_others(higher))
        except QplugError as error:  # such as a model of which nothing is left to quantize
            tried = self._tried(self._distances)
            raise self._stop.refused_at_highest(
                self._step, tried, f"{higher.schemes[-1]} is refused: {error}"
            ) from error
        self.raised = higher
        return self._watch.run

    def _settle(self, block: RaisedBlock) -> None:
        """Takes ``block`` with the distance at which it stays."""
        self.raised, run = block, self._watch.run
        self._watch.run = replace(run, raising=self._raising.with_raised(self._with_others(block)))

    def _with_others(self, block: RaisedBlock) -> list[RaisedBlock]:
        return [*(each for each in self._raising.raised if each.name != block.name), block]

    def _tried(self, distances: Sequence[float | None]) -> RaisedBlock:
        return self._raising.tried(self._step.name, distances, self._limit.distance)


def _known(distance: float) -> float | None:
    return four_digits(distance) if math.isfinite(distance) else None
