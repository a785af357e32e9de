"""How fast a scheme would be served: what was measured, scaled to another model and other GPUs.

A step of a server that writes takes the time to read bytes (of weights, once for all requests, and
of each request's cache) at the bandwidth of the GPUs, and a rest for each block: starts of kernels,
small operations, and what a kernel does not reach of the bandwidth. The rest is what was measured
less the time of the bytes, 65 to 100 microseconds a block. Prompts are arithmetic: they are scaled
by products and by the rate of the GPUs. Communication between GPUs is not counted, so figures for
several GPUs are too high.
"""

from __future__ import annotations

from dataclasses import dataclass

from qplug.api.gpus import GPUS, GpuModel
from qplug.api.scheme import PRESETS
from qplug.checkpoint.config_file import experts_of_a_token
from qplug.planning.measured import (
    MANY,
    RATES,
    SPEEDS,
    SPEEDS_BLOCKS,
    SPEEDS_CACHE,
    SPEEDS_GPU,
    SPEEDS_HEAD,
    SPEEDS_LINEARS,
    SPEEDS_TOKENS,
)
from qplug.planning.outline import Outline, is_expert


@dataclass(frozen=True)
class Work:
    """What a model has to read and to multiply under a scheme.

    ``dense`` and ``experts`` are bytes of linears outside and inside of routed experts, ``head``
    those of the head. ``share`` is the share of the experts that a token goes to. ``products`` is
    the number of weights that a token is multiplied with, ``blocks`` the number of decoder blocks.
    """

    dense: int
    experts: int
    head: int
    share: float
    products: float
    blocks: int

    def step(self, requests: int, cache: int) -> float:
        """The bytes of a step that writes a token of each of ``requests``.

        ``cache``: the bytes of the cache of all requests. Each token chooses its experts, so that
        ``1 - (1 - share) ** requests`` of them are read.
        """
        chosen = 1 - (1 - self.share) ** requests
        return self.dense + self.head + self.experts * chosen + cache


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

    ``cache``: the bytes of the cache of all requests. The rest of a step between 1 and 32 requests,
    which were measured, lies on a line; more requests take the rest of 32.
    """
    speed = SPEEDS.get(scheme)
    if speed is None:
        return None
    one = _rest(scheme, 1, 1 / speed.one)
    many = _rest(scheme, MANY, MANY / speed.many)
    rest = one + (many - one) * (min(requests, MANY) - 1) / (MANY - 1)
    seconds = work.step(requests, cache) / (gpu.bandwidth * 1e9 * count) + rest * work.blocks
    return requests / seconds


def reading(scheme: str, work: Work, gpu: GpuModel, count: int) -> float | None:
    """Returns the tokens of prompts that are read in a second; None if nothing was measured."""
    speed = SPEEDS.get(scheme)
    rate = RATES.get(scheme, "bf16")
    own: float = getattr(gpu, rate)
    before: float = getattr(GPUS[SPEEDS_GPU], rate)
    if speed is None or not own:
        return None
    products = (SPEEDS_LINEARS + SPEEDS_HEAD) / work.products
    return speed.prompts * products * own / before * count


def _rest(scheme: str, requests: int, seconds: float) -> float:
    """The seconds of a block in a measured step of ``seconds``, without those of the bytes."""
    bits = 16.0
    if scheme:
        weights = PRESETS[scheme].weights
        bits = weights.bits + (16 / weights.group_size if weights.group_size else 0)
    nbytes = SPEEDS_LINEARS * bits / 8 + 2 * SPEEDS_HEAD + requests * SPEEDS_TOKENS * SPEEDS_CACHE
    return (seconds - nbytes / (GPUS[SPEEDS_GPU].bandwidth * 1e9)) / SPEEDS_BLOCKS
