"""Says what a run needs memory for, for the message of a run whose memory ran out."""

from __future__ import annotations

import math

from qplug.api import ModelView
from qplug.calibration.samples import Samples
from qplug.machine.memory import gibibytes
from qplug.machine.session import Session
from qplug.output.plan import Plan


def memory_needs(
    plan: Plan, done: int, samples: Samples | None, view: ModelView, session: Session
) -> str:
    """Returns what the step after ``done`` steps needs memory for, and what to change.

    ``samples`` are the calibration samples, or None.
    """
    step = plan.steps[min(done, len(plan.steps) - 1)]
    shapes = [view.linears[name] for name in step.linears if name in view.linears]
    weights = 4 * sum(map(math.prod, shapes))
    sizes = f"{step.name} has {gibibytes(weights)} of weights in float32 on {session.device}"
    if samples is None:
        return f"{sizes}; use another --device, or a machine with more memory"
    states = 4 * samples.tokens.numel() * max(map(min, shapes), default=0)
    return (
        f"{sizes}, with {len(samples)} samples of {samples.length} tokens "
        f"({gibibytes(states)} of hidden states); use fewer --samples, a smaller --batch-size or "
        "--seq-len, or another --device"
    )
