"""``qplug verify``."""

from __future__ import annotations

import dataclasses
import json

import click

from qplug.progress import progress_bar
from qplug.registry import Registry

_SHOWN = 20


@click.command(name="verify")
@click.argument("folder")
@click.option("--against", metavar="MODEL", help="The float model; by default as recorded.")
@click.option("--backend", help="Whose rules apply; by default those it was written for.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    registry: Registry,
    folder: str,
    against: str | None,
    backend: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Check that an engine can load FOLDER, and that it is the model it came from.

    Every rule of the backend's loader is checked on the files; then the codes are unpacked and
    compared with the float model. Exit status 1 if anything is wrong.
    """
    from qplug.verification import verify

    with progress_bar("verifying") as bar:
        result = verify(
            folder,
            against=against,
            backend=backend,
            trust_remote_code=trust_remote_code,
            registry=registry,
            watch=lambda done, total: bar(done, total, "", None),
        )
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(result), "ok": result.ok}, indent=2))
    else:
        for problem in result.problems[:_SHOWN]:
            click.echo(str(problem))
        if len(result.problems) > _SHOWN:
            click.echo(f"... and {len(result.problems) - _SHOWN} problems more")
        click.echo(_verdict(result.ok, result.backend, result.linears, len(result.problems)))
        if result.errors:
            worst = max(result.errors, key=lambda name: result.errors[name])
            mean = sum(result.errors.values()) / len(result.errors)
            click.echo(
                f"relative error against {result.against}: "
                f"mean {mean:.4f}, worst {result.errors[worst]:.4f} ({worst})"
            )
        if result.rewritten:
            told = f"{result.rewritten} layers hold rewritten weights"
            click.echo(f"{told}: compare what they compute with qplug eval")
        elif result.ok and not result.errors:
            click.echo("not compared: the float model is not at hand; name it with --against")
    if not result.ok:
        raise click.exceptions.Exit(1)


def _verdict(ok: bool, backend: str, linears: int, problems: int) -> str:
    if ok:
        return f"sound: {linears} quantized layers, as {backend} loads them"
    return f"not sound: {problems} problems for {backend}"
