"""What a run is going to do, as its user and its watchers are told before the first step."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch

from qplug.api import Checkpoint, Engine
from qplug.api.events import Estimate, RunPlan, RunStart
from qplug.calibration.samples import Samples
from qplug.checkpoint.into_memory import nbytes_of
from qplug.checkpoint.names import block_of
from qplug.machine.session import Session
from qplug.output.plan import Plan
from qplug.run.costs import Machine, block_seconds, estimate
from qplug.run.prepare import Prepared
from qplug.run.stages import Stages
from qplug.run.workload import workload


def describe(
    model: str,
    source: Checkpoint,
    stages: Stages,
    plan: Plan,
    prepared: Prepared,
    samples: Samples | None,
    session: Session,
) -> RunPlan:
    """Returns what the run ``plan`` of ``model`` does, with an estimate of its costs.

    ``source`` is the checkpoint as it was opened; ``samples`` are None for a run without data.
    """
    recipe, view = stages.recipe, prepared.view
    names = view.config.get("architectures") or [view.config.get("model_type", "")]
    costs: Estimate | None = None
    each: tuple[float, ...] = ()
    if stages.efforts is not None:  # else the time of an algorithm is not known
        work = workload(
            plan,
            view,
            prepared.checkpoint,
            samples,
            stages.efforts,
            by_group=stages.by_group,
        )
        machine = Machine.of(session)
        costs, each = estimate(work, machine, plan.nbytes), block_seconds(work, machine)
    data = recipe.calibration
    return RunPlan(
        model=model,
        architecture=str(names[0]),
        parameters=sum(math.prod(tensor.spec.shape) for tensor in source.tensors.values()),
        blocks=len(view.blocks),
        algorithm="+".join(recipe.algorithms),
        scheme=_schemes(plan) or recipe.scheme.name,
        backend=recipe.backend,
        serve=_serve(stages.exporter.engine),
        dataset="" if data is None else data.dataset,
        samples=0 if samples is None else len(samples),
        seq_len=0 if samples is None else samples.length,
        device=_device(session.device),
        source_bytes=nbytes_of(source.tensors.values()),
        bytes=plan.nbytes,
        estimate=costs,
        block_seconds=each,
    )


def start_of(out: Path, plan: Plan, done: int, what: RunPlan, prepared: Prepared) -> RunStart:
    """Returns the start of the run ``plan`` into ``out``; ``done`` steps are finished already."""
    ends: dict[int, int] = {}
    for number, step in enumerate(plan.steps):
        block = block_of(f"{step.name}.", prepared.view.blocks)
        if block is not None:
            ends[block] = number + 1
    return RunStart(out, len(plan.steps), done, tuple(sorted(ends.values())), what)


def _schemes(plan: Plan) -> str:
    """The names of the schemes in ``plan``, of most linears first; "" if it quantizes none."""
    names = Counter(scheme.name for step in plan.steps for scheme in step.linears.values())
    return " and ".join(name for name, _ in names.most_common())


def _serve(engine: Engine | None) -> str:
    if engine is None:
        return ""
    return "qplug serve {}" if engine.server is not None else engine.serve_command or ""


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        count = torch.get_num_threads()
        return f"the CPU ({count} thread{'s' if count > 1 else ''})"
    return f"{device} ({torch.cuda.get_device_name(device)})"
