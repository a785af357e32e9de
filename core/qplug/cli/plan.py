"""``qplug plan``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import click

from qplug.api.scheme import CACHES
from qplug.cli.choice import Choice
from qplug.cli.completion import backends, gpus
from qplug.cli.printed_table import print_table
from qplug.cli.printing import Command, Piece, note, say, say_json, say_pieces
from qplug.planning.commands import quantizing, serving
from qplug.planning.fleet import find_fleet
from qplug.planning.headers import open_headers
from qplug.planning.measured import LOSSES_SOURCE
from qplug.planning.offers import Offer
from qplug.planning.outline import find_outline
from qplug.planning.plan import AIMS, PROMPT, USED, Aim, Fit, ModelPlan, Wish, make_plan
from qplug.planning.speed import MANY, timing_of
from qplug.registry.registry import Registry

_GB = 10**9


@click.command(name="plan", cls=Command)
@click.argument("model")
@click.option(
    "--gpu",
    default="auto",
    show_default=True,
    shell_complete=gpus,
    help="The GPUs to serve on: H100, H100x2, 4090, cpu, or auto for this machine's.",
)
@click.option(
    "--for",
    "aim",
    type=Choice(AIMS),
    default="latency",
    show_default=True,
    help="The proposal to print first: for one request at a time, for many, or for little memory.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Tokens of a request, prompt and answer together; at most what the model takes.",
)
@click.option(
    "--requests", type=click.IntRange(1), help="Requests at a time; default: as many as fit."
)
@click.option("--kv-cache", type=Choice(tuple(CACHES)), help="Store keys and values in fp8.")
@click.option("--backend", shell_complete=backends, help="Only this backend.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def command(
    registry: Registry,
    model: str,
    gpu: str,
    aim: Aim,
    context: int,
    requests: int | None,
    kv_cache: str | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Plan MODEL for GPUs: what each scheme needs, what fits, and which to take.

    MODEL is a folder, a Hub id, or qplug:demo. Only config.json and the headers of the weights are
    read. Sizes are those of the files that a run would write. Speeds are estimates: what was
    measured on one model, scaled by bytes, bandwidth and products.
    """
    fleet = find_fleet(gpu)
    if fleet.remark:
        note(fleet.remark)
    offers = registry.only("exporter", "reader")  # imports no torch
    outline = find_outline(open_headers(model, offers.sources))
    longest = outline.config.get("max_position_embeddings")
    if isinstance(longest, int) and 0 < longest < context:
        note(f"the model takes at most {longest} tokens: planned for requests of {longest}")
        context = longest
    bits = CACHES[kv_cache].bits if kv_cache else 16
    plan = make_plan(outline, fleet, Wish(context, requests, bits), offers, backend)
    commands = {
        each: [
            quantizing(model, fit, plan, offers, kv_cache),
            serving(model, fit, plan.wish, offers),
        ]
        for each, fit in plan.proposals.items()
        if fit is not None
    }
    order = (aim, *(each for each in AIMS if each != aim))
    if as_json:
        say_json(_plain(model, plan, order, commands))
        return
    _print_model(model, plan)
    say("")
    _print_table(plan)
    for each in order:
        say("")
        _print_proposal(each, plan, commands, order)


def _print_model(model: str, plan: ModelPlan) -> None:
    outline, fleet, cache, wish = plan.outline, plan.fleet, plan.cache, plan.wish
    kind = outline.view.config.get("model_type") or "a model"
    experts = f" of up to {outline.experts} experts" if outline.experts else ""
    source = f", stored in {outline.source_format}" if outline.source_format else ""
    say(
        f"{model}: {kind}, {_count(outline.parameters)} weights in {outline.blocks} blocks"
        f"{experts}, {_gb(outline.nbytes)} in {outline.view.dtype}{source}"
    )
    memory = f"{fleet.memory / 2**30:.0f} GiB"
    if fleet.is_cpu:
        say(f"{fleet.title}: {memory} free")
    else:
        rate = f", {fleet.model.bandwidth:,.0f} GB/s" if fleet.model else ""
        each = " each" if fleet.count > 1 else ""
        say(f"{fleet.title}: {memory}{rate}{each}; engines take {USED:.0%} of the memory")
    token = cache.nbytes(1, bits=wish.cache_bits)
    windows = f", windows of {', '.join(map(str, cache.windows))} tokens" if cache.windows else ""
    without = f", {cache.without} layers have none" if cache.without else ""
    say(
        f"KV cache: {token:,} bytes a token{windows}{without}; a request of "
        f"{wish.context} tokens takes {_gb(cache.nbytes(wish.context, bits=wish.cache_bits))}"
    )


def _print_table(plan: ModelPlan) -> None:
    rows = [["scheme", "backend", "kernel", "weights", "requests", "tokens/s", "loss", "--tp"]]
    rows.append(_row("float", "", "", plan.float_model))
    for fit in plan.fits:
        offer = fit.offer
        kernel = _emulation(offer) if offer.emulated else offer.kernel
        rows.append(_row(offer.scheme, offer.backend, kernel, fit))
    print_table(rows)
    served = {fit.offer.scheme for fit in plan.fits}
    missing = dict.fromkeys(each.scheme for each in plan.refusals if each.scheme not in served)
    if missing:
        say(f"not served: {', '.join(missing)}; why: --json")
    say("requests: as many have room; tokens/s: of one request, an estimate; loss: of perplexity")


def _emulation(offer: Offer) -> str:
    return f"{offer.kernel.partition(',')[0]}, emulated"


def _row(scheme: str, backend: str, kernel: str, fit: Fit) -> list[str]:
    loss = fit.loss
    return [
        scheme,
        backend,
        kernel,
        _gb(fit.offer.nbytes),
        f"{fit.requests:,}" if fit.requests else "no",
        f"{fit.one:,.0f}" if fit.one and fit.requests else "-",
        f"{loss.rise:+.1%}" if loss else "-",
        " ".join(map(str, fit.offer.processes)),
    ]


def _print_proposal(
    aim: Aim, plan: ModelPlan, commands: dict[Aim, list[str]], order: Sequence[Aim]
) -> None:
    fit, wish = plan.proposals[aim], plan.wish
    title = {
        "latency": "for latency, one request at a time",
        "throughput": "for throughput, many requests at a time",
        "size": "for size, the least memory",
    }[aim]
    if fit is None:
        say_pieces([Piece(title, "bold"), Piece(": nothing that is served fits")])
        for line in _hints(plan):
            say(f"  {line}")
        return
    earlier = next((e for e in order[: order.index(aim)] if plan.proposals[e] is fit), None)
    offer = fit.offer
    name = f"{offer.scheme} by {offer.backend}"
    if earlier is not None:
        say_pieces([Piece(title, "bold"), Piece(f": {name}, as for {earlier}")])
        return
    say_pieces([Piece(title, "bold"), Piece(f": {name}")])
    say(f"  size   {_gb(offer.nbytes)}{_shared(fit)}, room for {_room(fit, wish)}")
    say(f"  speed  {_speed(fit, plan)}")
    if fit.one is not None:
        timing = timing_of(bool(plan.outline.experts))
        dense = ", a dense model" if plan.outline.experts and not timing.experts else ""
        say(f"         an estimate, scaled from {timing.source}{dense}")
    say(f"  loss   {_loss(fit)}")
    for line in commands[aim]:
        say(f"  $ {line}")


def _shared(fit: Fit) -> str:
    return f" on {fit.processes} GPUs" if fit.processes > 1 else ""


def _room(fit: Fit, wish: Wish) -> str:
    what = "request" if fit.requests == 1 else "requests"
    return f"{fit.requests:,} {what} of {wish.context} tokens"


def _loss(fit: Fit) -> str:
    loss = fit.loss
    if loss is None:
        return "not measured: compare both models with qplug eval"
    return (
        f"perplexity {loss.perplexity:.3f} with {loss.algorithm}, {loss.base:.3f} before "
        f"({loss.rise:+.1%}), of {loss.model}"
    )


def _speed(fit: Fit, plan: ModelPlan) -> str:
    if fit.one is None:
        return "not measured on such a device"
    requests = plan.wish.requests or max(1, min(MANY, fit.requests))
    text = f"about {fit.one:,.0f} tokens/s for one request"
    if fit.many is not None and requests > 1:
        text += f", {fit.many:,.0f} for {requests}"
    if fit.both is not None and requests > 1:
        text += f" ({fit.both:,.0f} with the prompts, {PROMPT:.0%} of the tokens)"
    return text


def _hints(plan: ModelPlan) -> Iterator[str]:
    least = min((fit.offer.nbytes for fit in plan.fits), default=None)
    if least is None:
        yield "no backend serves this model on this device"
        return
    room = plan.fleet.memory * USED * plan.fleet.count
    one = plan.cache.nbytes(plan.wish.context, bits=plan.wish.cache_bits)
    asked = plan.wish.requests or 1
    need = least + asked * one
    if need > room:
        yield (
            f"the smallest needs {_gb(need)} with the cache, and {_gb(int(room))} are there: take "
            "more GPUs, fewer --requests, a shorter --context or --kv-cache fp8"
        )


def _plain(
    model: str, plan: ModelPlan, order: Sequence[Aim], commands: dict[Aim, list[str]]
) -> dict[str, Any]:
    outline, fleet, wish = plan.outline, plan.fleet, plan.wish
    return {
        "model": {
            "name": model,
            "type": outline.view.config.get("model_type"),
            "dtype": outline.view.dtype,
            "parameters": outline.parameters,
            "bytes": outline.nbytes,
            "blocks": outline.blocks,
            "experts": outline.experts,
            "source_format": outline.source_format or None,
        },
        "gpus": dataclasses.asdict(fleet),
        "wish": dataclasses.asdict(wish),
        "cache": {
            "bytes_per_token": plan.cache.nbytes(1, bits=wish.cache_bits),
            "bytes_per_request": plan.cache.nbytes(wish.context, bits=wish.cache_bits),
            "layers": len(plan.cache.layers),
            "windows": list(plan.cache.windows),
        },
        "float": _plain_fit(plan.float_model),
        "offers": [_plain_fit(fit) for fit in plan.fits],
        "refusals": [dataclasses.asdict(refusal) for refusal in plan.refusals],
        "sources": {"speed": timing_of(bool(outline.experts)).source, "loss": LOSSES_SOURCE},
        "proposals": [
            {
                "for": aim,
                "offer": None if fit is None else _plain_fit(fit),
                "commands": commands.get(aim, []),
            }
            for aim in order
            for fit in [plan.proposals[aim]]
        ],
    }


def _plain_fit(fit: Fit) -> dict[str, Any]:
    loss = fit.loss
    plain = dataclasses.asdict(fit)
    return {
        **plain.pop("offer"),
        "gpus": plain.pop("processes"),
        "weights_per_gpu": plain.pop("weights"),
        "cache_per_gpu_and_request": plain.pop("cache"),
        "requests": plain.pop("requests"),
        "tokens_per_second": plain,
        "loss": None if loss is None else {**dataclasses.asdict(loss), "rise": loss.rise},
    }


def _gb(nbytes: int) -> str:
    """``nbytes`` in GB, or in MB if they are few."""
    if nbytes >= _GB:
        return f"{nbytes / _GB:.1f} GB"
    return f"{nbytes / 10**6:.1f} MB"


def _count(weights: int) -> str:
    if weights >= 10**9:
        return f"{weights / 10**9:.1f} billion"
    return f"{weights / 10**6:.1f} million"
