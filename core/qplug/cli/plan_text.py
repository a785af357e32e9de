"""The paragraph that says before a run, or after a dry run, what the run does and takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug.checkpoint.locate import DEMO

if TYPE_CHECKING:
    from qplug.api.events import Estimate, RunPlan

#: The dataset that ships with qplug.
_DEMO_TEXT = "demo"


def plan_paragraph(plan: RunPlan) -> str:
    """Returns what the run does: the model, the recipe, the data, the device, time and memory."""
    blocks = f"{plan.blocks} block{'s' if plan.blocks != 1 else ''}"
    count = f"{in_words(plan.parameters)} parameters"
    data = "No calibration data is needed."
    if plan.dataset:
        data = (
            f"It calibrates on {plan.samples} windows of {plan.seq_len} tokens of {plan.dataset}."
        )
    return (
        f"{plan.model} ({plan.architecture}, {count}, {blocks}) becomes {plan.scheme} by "
        f"{plan.algorithm} for {plan.backend}: {plan.source_bytes / 1e6:,.1f} MB -> "
        f"{plan.bytes / 1e6:,.1f} MB. {data}{_raising(plan)} {_costs(plan.estimate, plan.device)}"
    )


def _raising(plan: RunPlan) -> str:
    """Returns what becomes of a block that is too far from the float model; "" if it stops."""
    if plan.stop_at is None or not plan.raises_to:
        return ""
    return (
        f" A block whose output is more than {plan.stop_at:g} from the float model's is raised to "
        f"{', then '.join(plan.raises_to)}."
    )


def data_warning(plan: RunPlan) -> str | None:
    """Returns a sentence if the calibration text is unlike what ``plan.model`` reads, else None."""
    if plan.dataset != _DEMO_TEXT or plan.model == DEMO:
        return None
    return (
        f"{plan.model} is calibrated on demo, which is Python's documentation; better is text like "
        "its prompts: --dataset text --dataset-opt path=FILE, or --dataset auto, WikiText"
    )


def _costs(estimate: Estimate | None, device: str) -> str:
    from qplug.machine.memory import gibibytes

    if estimate is None:
        return f"It runs on {device}; the time of this algorithm is not known."
    where = f"On {device}"
    if estimate.processes > 1:
        where = f"In {estimate.processes} processes, each on a device like {device},"
    each = " each" if estimate.processes > 1 else ""
    memory = f"{gibibytes(estimate.memory)} of memory"
    if estimate.gpu_memory is not None:
        memory = f"{gibibytes(estimate.gpu_memory)} of GPU memory, {memory} of the host"
    return (
        f"{where} it takes about {duration(estimate.seconds)}, {memory}{each}, and "
        f"{gibibytes(estimate.disk)} on disk (docs/scale.md says how good this estimate is)."
    )


def duration(seconds: float) -> str:
    """Returns ``seconds`` to two digits, in seconds, minutes or hours."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"


def in_words(count: int) -> str:
    """Returns ``count`` to two digits, in millions, billions or trillions if it is that large."""
    for word, size in (("trillion", 10**12), ("billion", 10**9), ("million", 10**6)):
        if count >= size:
            return f"{float(f'{count / size:.3g}'):g} {word}"
    return f"{count:,}"
