"""Watches how far the output of each block is from the float model's, and stops a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from shlex import quote
from typing import Literal, TypeAlias, get_args

from qplug.api import ModelView
from qplug.api.events import RaisedBlock
from qplug.api.scheme import preset
from qplug.checkpoint.names import is_within
from qplug.choosing.ladder import wider_schemes
from qplug.errors import QplugError
from qplug.output.plan import Plan, Step
from qplug.output.unfinished import KeptError
from qplug.run.stages import Stages

#: What a run does after a block that is above the limit.
OnStop: TypeAlias = Literal["stop", "raise"]


@dataclass(frozen=True)
class Limit:
    """The ``distance`` from the float model above which a run stops, or raises the block."""

    distance: float
    on_stop: OnStop = "stop"

    @property
    def raises(self) -> bool:
        """Whether a block above the limit gets more bits."""
        return self.on_stop == "raise"

    @classmethod
    def of(cls, stop_at: float | None, on_stop: str, stages: Stages) -> Limit | None:
        """Returns the limit of a run of ``stages``, None without one.

        Raises QplugError if the run does not see how far a block is from the float model.
        """
        if on_stop not in get_args(OnStop):
            raise QplugError(f"--on-stop {on_stop}: must be {' or '.join(get_args(OnStop))}")
        if stop_at is None:
            if on_stop == "raise":
                raise QplugError(
                    "--on-stop raise: give --stop-at DISTANCE too, above which a block is raised"
                )
            return None
        _refuse_blind(stop_at, stages)
        return cls(stop_at, "raise" if on_stop == "raise" else "stop")

    def is_kept(self, distance: float) -> bool:
        """Whether ``distance`` is within the limit; NaN is not."""
        return distance <= self.distance


def _refuse_blind(limit: float, stages: Stages) -> None:
    """Raises QplugError if a run of ``stages`` does not see how far a block is from ``limit``."""
    data = stages.recipe.calibration
    if not limit > 0:
        raise QplugError(f"--stop-at {limit:g}: must be above 0")
    if data is None:
        raise QplugError(
            f"--stop-at: {'+'.join(stages.recipe.algorithms)} needs no calibration data, on which "
            "blocks are compared; take --algo gptq or awq"
        )
    if data.propagate == "float":
        raise QplugError(
            "--stop-at: only the float model runs with --propagate float or a float backend; "
            "there is nothing to compare"
        )


class StopAt:
    """Stops a run when the distance of the residual stream exceeds ``limit``."""

    def __init__(self, limit: Limit, stages: Stages, plan: Plan, view: ModelView) -> None:
        self._limit, self._stages, self._plan, self._view = limit, stages, plan, view
        self._before = 0.0

    def __call__(self, step: Step, distance: float) -> None:
        """Raises KeptError if ``distance``, after the block ``step``, is above the limit."""
        before, self._before = self._before, distance
        if self._limit.is_kept(distance):
            return
        raise KeptError(
            f"{self._how_far(step, distance, before)}; {self._way_out(step)}"
            ", or raise --stop-at: a run that differs in --stop-at alone goes on with the blocks "
            "before"
        )

    def refuse_finished(self, step: Step, distance: float) -> None:
        """Raises KeptError if ``step``, which an earlier run has finished, is above the limit.

        The run raises blocks, but the blocks after this one have read its output already.
        """
        before, self._before = self._before, distance
        if self._limit.is_kept(distance):
            return
        raise KeptError(
            f"{self._how_far(step, distance, before)}, and an earlier run without this limit has "
            "finished it; pass --overwrite to begin again, or raise --stop-at"
        )

    def refused_at_highest(self, step: Step, tried: RaisedBlock, why: str = "") -> KeptError:
        """Returns the error that ``step`` is above the limit also at the last scheme ``tried``.

        ``why`` says why the scheme after it cannot be tried; "" if there is none.
        """
        away = [math.inf if distance is None else distance for distance in tried.distances]
        others = [*zip(tried.schemes[1:], away[1:], strict=True)]
        raised = " and ".join(f"{scheme} ({_number(each)})" for scheme, each in others)
        also = f", also when it is raised to {raised}" if others else ""
        also += f", and {why}" if why else ""
        return KeptError(
            f"{self._how_far(step, away[0], self._before)}{also}; give the blocks before it more "
            "bits, or raise --stop-at: a run that differs in --stop-at alone goes on with the "
            "blocks before"
        )

    def _how_far(self, step: Step, distance: float, before: float) -> str:
        return (
            f"{step.name}: the hidden states after it are {_number(distance)} away from the float "
            f"model's ({before:.3f} before it), more than --stop-at {self._limit.distance:g}"
        )

    def _way_out(self, step: Step) -> str:
        """What to do about the block ``step``, with the option that does it."""
        pattern = f"{step.name}.*"
        schemes = {n: scheme for each in self._plan.steps for n, scheme in each.linears.items()}
        own = [*step.linears.values()]
        bits = max(scheme.weights.bits for scheme in own)
        for name in wider_schemes(own[0].activations) if bits < 8 else ():
            wider = {n: preset(name) if is_within(step.name, n) else s for n, s in schemes.items()}
            if self._stages.exporter.refuses(self._view, wider) is None:
                return f"give it 8 bits: --override {quote(f'{pattern}={name}')}"
        return f"leave it float: --ignore {quote(pattern)}"


def _number(distance: float) -> str:
    return f"{distance:.3f}" if math.isfinite(distance) else "infinitely"
