"""The plan for a model on GPUs: what fits, and the best offers for speed and for size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from qplug.planning.fleet import Fleet
from qplug.planning.kv_cache import Cache, find_cache
from qplug.planning.measured import LOSSES, SPEEDS_ENGINE, Loss
from qplug.planning.offers import Offer, Refusal, find_offers, sizes
from qplug.planning.outline import Outline
from qplug.planning.speed import MANY, reading, work_of, writing
from qplug.planning.timing import Work
from qplug.registry.registry import Registry

Aim = Literal["latency", "throughput", "size"]

#: What a plan is for, in the order of proposals.
AIMS: tuple[Aim, ...] = ("latency", "throughput", "size")

#: The share of a GPU's memory that engines take: --gpu-memory-utilization of vLLM 0.26 is 0.9.
USED = 0.9
#: The share of a request's tokens that are its prompt, where throughput is estimated.
PROMPT = 0.75


@dataclass(frozen=True)
class Wish:
    """What is asked of the server: ``requests`` at a time, each of ``context`` tokens.

    ``requests`` is None if nobody said: one request must fit, and throughput is estimated for as
    many as fit, up to the most that were timed. ``cache_bits`` is 8 for an fp8 cache.
    """

    context: int = 8192
    requests: int | None = None
    cache_bits: int = 16


@dataclass(frozen=True)
class Fit:
    """An offer on a number of GPUs.

    ``weights`` and ``cache`` are bytes on each GPU, of all weights and of one request.
    ``requests`` is the number of requests that have room together; 0 if the weights have none. The
    speeds are estimates of tokens a second: one request alone, all that were asked for together,
    and both reading and writing of those; None where nothing was measured.
    """

    offer: Offer
    processes: int
    weights: int
    cache: int
    requests: int
    one: float | None
    many: float | None
    both: float | None

    @property
    def loss(self) -> Loss | None:
        """What was measured of the loss; None if nothing was."""
        return LOSSES.get(self.offer.scheme)


@dataclass(frozen=True)
class ModelPlan:
    """The plan: every offer, the float model for comparison, and a proposal for each aim."""

    outline: Outline
    fleet: Fleet
    wish: Wish
    cache: Cache
    float_model: Fit
    fits: tuple[Fit, ...]
    refusals: tuple[Refusal, ...]
    proposals: dict[Aim, Fit | None]


def make_plan(
    outline: Outline, fleet: Fleet, wish: Wish, registry: Registry, backend: str | None = None
) -> ModelPlan:
    """Returns the plan for the model of ``outline`` on ``fleet``. No weight is read.

    ``backend`` names the only backend to ask; None asks all that have an engine.
    """
    cache = find_cache(outline)
    offers, refusals = find_offers(outline, fleet, registry, backend)
    total, dense, experts = sizes(outline, {}, None)
    everywhere = tuple(sorted({count for offer in offers for count in offer.processes})) or (1,)
    plain = Offer("", "", "", "", False, "", total, dense, experts, (), everywhere)
    measure = _Measure(outline, fleet, wish, cache)
    fits = [measure(offer) for offer in offers]
    return ModelPlan(
        outline,
        fleet,
        wish,
        cache,
        measure(plain),
        tuple(fits),
        tuple(refusals),
        {aim: _best(fits, aim, wish) for aim in AIMS},
    )


@dataclass(frozen=True)
class _Measure:
    """Measures offers of one model on one fleet."""

    outline: Outline
    fleet: Fleet
    wish: Wish
    cache: Cache

    def __call__(self, offer: Offer) -> Fit:
        """Returns ``offer`` on as many GPUs of the fleet as the engine can divide it among."""
        possible = [count for count in offer.processes if count <= self.fleet.count]
        processes = max(possible, default=1)
        own = self.cache.nbytes(self.wish.context, bits=self.wish.cache_bits, processes=processes)
        weights = -(-offer.nbytes // processes)
        room = self.fleet.memory * USED - weights
        fitting = 0 if room < own else int(room // own) if own else self.wish.requests or 1
        work = work_of(self.outline, offer.dense, offer.experts)
        asked = self.wish.requests or max(1, min(MANY, fitting))
        return Fit(
            offer,
            processes,
            weights,
            own,
            fitting,
            self._writing(offer, work, processes, 1),
            self._writing(offer, work, processes, asked),
            self._both(offer, work, processes, asked),
        )

    def _writing(self, offer: Offer, work: Work, processes: int, requests: int) -> float | None:
        if self.fleet.model is None:
            return None
        tokens = int(self.wish.context * (1 + PROMPT) / 2)  # in the middle of the answer
        cache = requests * self.cache.nbytes(tokens, bits=self.wish.cache_bits)
        return writing(offer.scheme, work, self.fleet.model, processes, requests, cache)

    def _both(self, offer: Offer, work: Work, processes: int, requests: int) -> float | None:
        written = self._writing(offer, work, processes, requests)
        if self.fleet.model is None or written is None:
            return None
        read = reading(offer.scheme, work, self.fleet.model, processes)
        return None if read is None else 1 / (PROMPT / read + (1 - PROMPT) / written)


def _best(fits: Sequence[Fit], aim: Aim, wish: Wish) -> Fit | None:
    """Returns the best of ``fits`` for ``aim`` that has room; None if none has.

    Those come first whose loss was measured and whose backend has an engine of its own, then those
    with one of both. Of backends that are alike, the one whose kernel was run on the device comes
    first, then the one whose engine was timed.
    """
    able = [fit for fit in fits if fit.requests >= (wish.requests or 1)]
    likely = max(map(_likeliness, able), default=0)
    able = [fit for fit in able if _likeliness(fit) == likely]
    timed: dict[Aim, list[Fit]] = {
        "latency": [fit for fit in able if fit.one is not None],
        "throughput": [fit for fit in able if fit.both is not None],
        "size": able,
    }
    keys: dict[Aim, Callable[[Fit], float]] = {
        "latency": lambda fit: -(fit.one or 0.0),
        "throughput": lambda fit: -(fit.both or 0.0),
        "size": lambda fit: fit.offer.nbytes,
    }

    def order(fit: Fit) -> tuple[float, int, bool, bool, str]:
        offer, is_timed = fit.offer, fit.offer.engine.startswith(SPEEDS_ENGINE)
        return keys[aim](fit), offer.nbytes, not offer.was_run, not is_timed, offer.backend

    # Where no speed is known, few bytes are all that is known of it.
    return min(timed[aim] or able, key=order, default=None)


def _likeliness(fit: Fit) -> int:
    return 2 * (fit.loss is not None) + fit.offer.has_server
