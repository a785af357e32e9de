"""``qplug schemes``."""

from __future__ import annotations

import dataclasses
import json

import click

from qplug.registry import Registry
from qplug.scheme import PRESETS, QuantArgs, Scheme


@click.command(name="schemes")
@click.option("--backend", help="Only this backend.")
@click.option("--json", "as_json", is_flag=True, help="Print the tables as JSON.")
@click.pass_obj
def command(registry: Registry, backend: str | None, as_json: bool) -> None:
    """List the schemes, and which engine runs each with which kernel.

    Others can be measured: quantize --backend fake, then eval. They are W<weights>A<inputs>, each 2
    to 8 (bits of an integer) or E<e>M<m> (a float, 1 to 8 bits of exponent and 0 to 7 of mantissa),
    or A16 where inputs stay as they are: W3A16, W4A4, WE2M1A16, WE5M2AE5M2.
    """
    names = [backend] if backend else list(registry.exporters)
    tables = {name: registry.exporters[name].capabilities() for name in names}
    if as_json:
        rows = {name: [dataclasses.asdict(row) for row in table] for name, table in tables.items()}
        click.echo(json.dumps({"schemes": _plain(), "backends": rows}, indent=2))
        return
    for scheme in PRESETS.values():
        click.echo(f"{scheme.name:<12} {describe(scheme)}")
        for name, table in tables.items():
            for row in table:
                if row.scheme == scheme.name:
                    sizes = ", ".join(map(str, row.group_sizes))
                    groups = f", groups {sizes}" if sizes else ""
                    sides = f", out % {row.out_multiple}, in % {row.in_multiple}"
                    limits = f"{groups}{sides}" if row.served else ""
                    verb = row.kernel if row.served else f"no: {row.kernel}"
                    click.echo(f"  {name:<8} {verb}{limits} ({row.evidence})")


def _plain() -> dict[str, object]:
    return {name: scheme.to_dict() for name, scheme in PRESETS.items()}


def describe(scheme: Scheme) -> str:
    """``int4 weights a group of 128; int8 inputs a token``."""
    inputs = scheme.activations
    told = f"{_args(scheme.weights, of_weights=True)} weights"
    return told + (f"; {_args(inputs, of_weights=False)} inputs" if inputs else "")


def _args(args: QuantArgs, *, of_weights: bool) -> str:
    size = args.group_size or (args.block and "x".join(map(str, args.block)))
    kind = "" if args.symmetric else " asymmetric"
    if not of_weights and not args.dynamic:
        return f"{args.dtype}{kind}, one stored scale,"
    return f"{args.dtype}{kind}, a scale each {args.strategy}{f' of {size}' if size else ''},"
