"""The command lines that carry out a proposal: complete, to be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

from qplug.api import Server
from qplug.api.scheme import CACHES, PRESETS
from qplug.planning.offers import Offer
from qplug.planning.plan import Fit, ModelPlan, Wish
from qplug.registry.registry import Registry
from qplug.registry.suggestions import usual_algorithm


def algorithm_for(fit: Fit, registry: Registry) -> str:
    """Returns the algorithm whose loss was measured; else the usual one."""
    if fit.loss is not None:
        return fit.loss.algorithm
    return usual_algorithm(PRESETS[fit.offer.scheme], registry)


def quantizing(model: str, fit: Fit, plan: ModelPlan, registry: Registry, cache: str | None) -> str:
    """Returns the command that quantizes ``model``. ``cache``: the name in ``CACHES``, or None.

    An engine that does not take stored scales of a cache is given none.
    """
    offer, fleet = fit.offer, plan.fleet
    gpu = fleet.name if fleet.model is not None else fleet.device
    words = ["qplug", "quantize", model, "--algo", algorithm_for(fit, registry)]
    words += ["--scheme", offer.scheme]
    words += ["--backend", offer.backend, "--backend-opt", f"gpu={gpu}"]
    if fit.processes > 1:
        words += ["--backend-opt", f"tp={fit.processes}"]
    exporter = registry.exporters.make_own(offer.backend)
    if cache is not None and exporter.refuses_cache(CACHES[cache], plan.outline.view) is None:
        words += ["--kv-cache", cache]
    return shlex.join([*words, "--out", _out(model, offer)])


def serving(model: str, fit: Fit, wish: Wish, registry: Registry) -> str:
    """Returns the command that serves the folder that ``quantizing`` writes."""
    words = ["qplug", "serve", _out(model, fit.offer)]
    backend, server = _server(fit.offer, registry)
    if backend is not None and backend != fit.offer.backend:
        words += ["--backend", backend]
    options = []
    if server is not None and fit.processes > 1 and server.processes_option:
        options += [server.processes_option, str(fit.processes)]
    if server is not None and server.context_option:
        options += [server.context_option, str(wish.context)]
    return shlex.join([*words, "--", *options] if options else words)


def _out(model: str, offer: Offer) -> str:
    name = Path(model.rpartition(":")[2]).name or "model"
    return f"./{name}-{offer.scheme}"


def _server(offer: Offer, registry: Registry) -> tuple[str | None, Server | None]:
    """Returns the backend whose engine is that of ``offer`` and has a server, and the server.

    Formats that several engines load, such as GPTQ, have none of their own.
    """
    kinds = registry.exporters.without_clashes()
    own = kinds[offer.backend].engine if offer.backend in kinds else None
    if own is not None and own.server is not None:
        return offer.backend, own.server
    engine = offer.engine.partition(" ")[0]
    for name, kind in kinds.items():
        if kind.engine is not None and kind.engine.server and engine in kind.engine.servers:
            return name, kind.engine.server
    return None, None
