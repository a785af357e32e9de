"""Stops a run after a block whose output is too far from the float model's."""

from __future__ import annotations

import math
from shlex import quote

from qplug.api import ModelView
from qplug.api.scheme import preset
from qplug.checkpoint.names import is_within
from qplug.errors import QplugError
from qplug.output.plan import Plan, Step
from qplug.output.unfinished import KeptError
from qplug.run.stages import Stages

#: Schemes of 8 bits that may take the place of others, the one that changes least first.
_WIDER = ("W8A16", "FP8_DYNAMIC", "W8A8")


def refuse_blind(limit: float | None, stages: Stages) -> None:
    """Raises QplugError if a run of ``stages`` does not see how far a block is from ``limit``."""
    data = stages.recipe.calibration
    if limit is None:
        return
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

    def __init__(self, limit: float, stages: Stages, plan: Plan, view: ModelView) -> None:
        self._limit, self._stages, self._plan, self._view = limit, stages, plan, view
        self._before = 0.0

    @classmethod
    def of(cls, limit: float | None, stages: Stages, plan: Plan, view: ModelView) -> StopAt | None:
        """Returns what stops a run at ``limit``; None without a limit."""
        return None if limit is None else cls(limit, stages, plan, view)

    def __call__(self, step: Step, distance: float) -> None:
        """Raises KeptError if ``distance``, after the block ``step``, is above the limit."""
        before, self._before = self._before, distance
        if distance <= self._limit:  # False for NaN
            return
        number = f"{distance:.3f}" if math.isfinite(distance) else "infinitely"
        raise KeptError(
            f"{step.name}: the hidden states after it are {number} away from the float model's "
            f"({before:.3f} before it), more than --stop-at {self._limit:g}; {self._way_out(step)}"
            ", or raise --stop-at: a run that differs in --stop-at alone goes on with the blocks "
            "before"
        )

    def _way_out(self, step: Step) -> str:
        """What to do about the block ``step``, with the option that does it."""
        pattern = f"{step.name}.*"
        schemes = {n: scheme for each in self._plan.steps for n, scheme in each.linears.items()}
        bits = max(scheme.weights.bits for scheme in step.linears.values())
        for name in _WIDER if bits < 8 else ():
            wider = {n: preset(name) if is_within(step.name, n) else s for n, s in schemes.items()}
            if self._stages.exporter.refuses(self._view, wider) is None:
                return f"give it 8 bits: --override {quote(f'{pattern}={name}')}"
        return f"leave it float: --ignore {quote(pattern)}"
