"""How fast a scheme would be served: what was measured, scaled to another model and other GPUs.

A step of a server that writes takes the time to read bytes (of weights, once for all requests, and
of each request's cache) at the bandwidth of the GPUs, and a rest for each block: starts of kernels,
small operations, and what a kernel does not reach of the bandwidth. The rest is what was measured
less the time of the bytes. What the rest grows by with more requests is arithmetic, as prompts are:
both are scaled by products and by the rate of the GPUs. Communication between GPUs is not counted,
so figures for several GPUs are too high.
"""

from __future__ import annotations

from qplug.api.gpus import GpuModel
from qplug.checkpoint.config_file import experts_of_a_token
from qplug.planning.measured import RATES
from qplug.planning.outline import Outline, is_expert
from qplug.planning.speeds import TIMINGS
from qplug.planning.timing import Timing, Work

#: The most requests at a time that were timed.
MANY = max(TIMINGS[0].speeds[""].writing)


def timing_of(has_experts: bool) -> Timing:
    """Returns the timing of a model of the same kind, else the first one.

    One timing has all schemes of a plan, so that their order is one that was measured.
    """
    return next((t for t in TIMINGS if bool(t.experts) == has_experts), TIMINGS[0])


def work_of(outline: Outline, dense: int, experts: int) -> Work:
    """Returns the work of a model whose linears have ``dense`` and ``experts`` bytes."""
    share = 0.0
    if outline.experts:
        share = min(1.0, (experts_of_a_token(outline.view.config) or 1) / outline.experts)
    products = float(outline.table)
    for name, shape in outline.view.linears.items():
        if name != outline.view.head:
            part = share if is_expert(name) else 1.0
            products += outline.counts[name] * shape[0] * shape[1] * part
    return Work(dense, experts, 2 * outline.table, share, products, outline.blocks)


def writing(
    scheme: str, work: Work, gpu: GpuModel, count: int, requests: int, cache: int
) -> float | None:
    """Returns the tokens a second that ``requests`` get together; None if nothing was measured.

    ``cache``: the bytes of the cache of all requests.
    """
    timing = timing_of(work.experts > 0)
    if scheme not in timing.speeds:
        return None
    alone = timing.rest(scheme, 1) * work.blocks
    grown = (timing.rest(scheme, requests) - timing.rest(scheme, 1)) * timing.blocks
    rate = RATES.get(scheme, "bf16")
    own: float = getattr(gpu, rate) or gpu.bf16
    before: float = getattr(timing.model, rate)
    grown *= work.products / timing.work(scheme).products * before / own / count
    seconds = work.step(requests, cache) / (gpu.bandwidth * 1e9 * count) + alone + grown
    return requests / seconds


def reading(scheme: str, work: Work, gpu: GpuModel, count: int) -> float | None:
    """Returns the tokens of prompts that are read in a second; None if nothing was measured."""
    timing = timing_of(work.experts > 0)
    rate = RATES.get(scheme, "bf16")
    own: float = getattr(gpu, rate)
    before: float = getattr(timing.model, rate)
    if scheme not in timing.speeds or not own:
        return None
    products = timing.work(scheme).products / work.products
    return timing.speeds[scheme].reading * products * own / before * count
