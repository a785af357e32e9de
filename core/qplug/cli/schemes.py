"""``qplug schemes``."""

from __future__ import annotations

import dataclasses

import click

from qplug.api import Capability, ModelView
from qplug.api.capability import NEWEST
from qplug.api.gpus import Column
from qplug.api.limits import Target, row_problem
from qplug.api.scheme import E4M3_SCALES, E8M0_SCALES, PRESETS, QuantArgs, Scheme, preset
from qplug.cli.completion import backends, gpus, schemes
from qplug.cli.printing import Command, note, say, say_json
from qplug.cli.scheme_matrix import print_matrix
from qplug.errors import QplugError
from qplug.machine.gpus import column_for
from qplug.registry.registry import Registry

_SCALES = {E4M3_SCALES: " in e4m3 and a global one", E8M0_SCALES: " in e8m0"}


@click.command(name="schemes", cls=Command)
@click.argument("scheme", required=False, shell_complete=schemes)
@click.option("--backend", shell_complete=backends, help="Only this backend.")
@click.option("--engine-version", metavar="V", help="Version of its engine; default: the newest.")
@click.option(
    "--gpu",
    shell_complete=gpus,
    help="Only the kernels for this GPU: H100, 4090, sm90, ..., cpu, or auto for this machine's.",
)
@click.option("--model", help="Say which kernels take the shapes of this model.")
@click.option("--tp", type=click.IntRange(1), help="Split the model over this many processes.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the tables as JSON.")
@click.pass_obj
def command(
    registry: Registry,
    scheme: str | None,
    backend: str | None,
    engine_version: str | None,
    gpu: str | None,
    model: str | None,
    tp: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """List the schemes, and which engine runs each on which device.

    With SCHEME, --backend, --gpu or --model: with which kernel, which shapes it takes, and how that
    is known.

    No engine runs the other schemes, but qplug can measure them: quantize --backend fake, then
    eval. Their names are W<weights>A<inputs>. Both are 2 to 8 (bits of an integer) or E<e>M<m> (a
    float, 1 to 8 bits of exponent and 0 to 7 of mantissa); A16 keeps inputs as they are. Examples:
    W4A4, W6A6, WE2M1A16, WE5M2AE5M2.
    """
    if tp is not None and model is None:
        raise QplugError("--tp splits a model over processes: name the model with --model")
    if engine_version is not None and backend is None:
        raise QplugError("--engine-version needs an engine: name its backend with --backend")
    column = Column("any") if gpu is None else column_for(gpu)
    if column.remark:
        note(column.remark)
    target = Target(column.device, tp or 1)
    named = None if scheme is None else _preset(scheme)
    offers = registry.only("exporter")  # imports no torch
    names = [backend] if backend else list(offers.exporters)
    version = engine_version or NEWEST
    tables = {
        name: [row for row in _rows(offers, name, version, target.gpu) if _is_of(row, named)]
        for name in names
    }
    view = None if model is None else _view(model, registry, trust_remote_code)
    if as_json:
        rows = {
            name: [{**dataclasses.asdict(row), **_fits(row, view, target)} for row in table]
            for name, table in tables.items()
        }
        say_json({"schemes": _plain(), "backends": rows})
        return
    if named is None and backend is None and gpu is None and model is None:
        print_matrix(tables)
        say("kernels and shapes: qplug schemes W4A16, --backend vllm, --gpu H100, --model MODEL")
        return
    for each in [named] if named else PRESETS.values():
        say(f"{each.name:<12} {describe(each)}")
        for name, table in tables.items():
            for row in table:
                if row.scheme == each.name:
                    say(f"  {name:<8} {_line(row)}")
                    for problem in _fits(row, view, target).values():
                        say(f"  {'':<8}   {problem or 'takes the model'}")


def _preset(name: str) -> Scheme:
    """Returns the scheme that engines serve under ``name``. Raises QplugError for others."""
    found = preset(name)
    if found.name not in PRESETS:
        raise QplugError(
            f"{found.name}: no engine serves it; measure it with quantize --backend fake, then eval"
        )
    return found


def _is_of(row: Capability, scheme: Scheme | None) -> bool:
    return scheme is None or row.scheme == scheme.name


def _rows(registry: Registry, name: str, version: str, gpu: str) -> list[Capability]:
    """The kernels of an engine version on ``gpu`` ("any": on all); [] if the backend has none."""
    engine = registry.exporters[name].engine
    rows = engine.at(version).capabilities() if engine is not None else []
    return [row for row in rows if gpu in ("any", *row.devices)]


def _view(model: str, registry: Registry, trust_remote_code: bool) -> ModelView:
    from qplug.machine.session import Session
    from qplug.reading.folder import open_folder

    session = Session(registry, trust_remote_code=trust_remote_code)
    return open_folder(model, session, or_float=True).view


def _fits(row: Capability, view: ModelView | None, target: Target) -> dict[str, str | None]:
    """``{"problem": sentence}`` about the first linear whose shape the kernel does not take.

    The sentence is None if the kernel takes all of them; the dict is empty without a model.
    """
    if view is None or not row.served:
        return {}
    scheme = PRESETS[row.scheme]
    for name in view.linears:
        if name in view.quantizable:
            problem = row_problem(row, name, view, scheme, target.tp)
            if problem is not None:
                return {"problem": f"not this model: {name}: {problem}"}
    return {"problem": None}


def _line(row: Capability) -> str:
    where = " ".join(filter(None, (row.engine, " ".join(row.devices))))
    head = f"{where}: " if where else ""
    if not row.served:
        return f"{head}no: {row.kernel} ({row.evidence})"
    return f"{head}{row.kernel}{limits(row)} ({row.evidence})"


def limits(row: Capability) -> str:
    """The shapes that a kernel takes, as in ``, groups 32, 64, -1, out % 64, in % 128``."""
    sizes = ", ".join(map(str, row.group_sizes))
    groups = f", groups {sizes}" if sizes else ""
    return f"{groups}, out % {row.out_multiple}, in % {row.in_multiple}"


def _plain() -> dict[str, object]:
    return {name: scheme.to_dict() for name, scheme in PRESETS.items()}


def describe(scheme: Scheme) -> str:
    """A scheme in words: ``int4, a scale each group of 128, weights; int8, ..., inputs``."""
    inputs = scheme.activations
    weights = f"{_args(scheme.weights, of_weights=True)} weights"
    return weights + (f"; {_args(inputs, of_weights=False)} inputs" if inputs else "")


def _args(args: QuantArgs, *, of_weights: bool) -> str:
    size = args.group_size or (args.block and "x".join(map(str, args.block)))
    kind = "" if args.symmetric else " asymmetric"
    if not of_weights and not args.dynamic:
        return f"{args.dtype}{kind}, one stored scale,"
    shared = f"{args.strategy}{f' of {size}' if size else ''}{_SCALES.get(args.scale_dtype, '')}"
    return f"{args.dtype}{kind}, a scale each {shared},"
