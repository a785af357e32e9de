"""``qplug verify``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from qplug.api.params import parse_pairs
from qplug.cli.progress import progress_bar
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from qplug.reading.compare import Comparison
    from qplug.reading.engine import EngineCheck
    from qplug.reading.verify import Verification

_SHOWN = 20
#: What ``--engine`` without a name stands for.
_OWN = "as written for"


@click.command(name="verify")
@click.argument("folder")
@click.argument("arguments", metavar="[-- ENGINE ARGS]", nargs=-1, type=click.UNPROCESSED)
@click.option("--against", metavar="MODEL", help="Compare what it computes with this float model.")
@click.option("--backend", help="Whose rules apply; by default those it was written for.")
@click.option(
    "--engine",
    is_flag=False,
    flag_value=_OWN,
    metavar="[NAME]",
    help="Start this engine (vllm or sglang), and compare it with qplug's reader.",
)
@click.option("--python", metavar="PATH", help="The Python that has the engine.")
@click.option("--windows", default=4, show_default=True, type=click.IntRange(1))
@click.option("--seq-len", default=256, show_default=True, type=click.IntRange(2))
@click.option("--dataset", default="demo", show_default=True, help="The text that is compared on.")
@click.option("--dataset-opt", "dataset_options", metavar="K=V", multiple=True)
@click.option("--max-kl", default=0.3, show_default=True, help="The divergence allowed, in nats.")
@click.option("--min-top1", default=0.7, show_default=True, help="The agreement wanted, 0 to 1.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or cuda[:N].")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    registry: Registry,
    folder: str,
    arguments: tuple[str, ...],
    against: str | None,
    backend: str | None,
    engine: str | None,
    python: str | None,
    windows: int,
    seq_len: int,
    dataset: str,
    dataset_options: tuple[str, ...],
    max_kl: float,
    min_top1: float,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Check that an engine can load FOLDER, and that it is the model it came from.

    Every rule of the backend's loader is checked on the files; then the codes are unpacked and
    compared with the float model that is recorded. --against runs both models on a few calibration
    windows, one block in memory at a time, and compares the blocks' outputs and the predictions.
    --engine serves the folder for a moment, and compares the log-probabilities of some text; what
    comes after -- is passed to the engine. Exit status 1 if anything is wrong.
    """
    from qplug.reading.verify import verify

    with progress_bar("verifying") as bar:
        result = verify(
            folder,
            against=against,
            backend=backend,
            trust_remote_code=trust_remote_code,
            registry=registry,
            watch=lambda done, total: bar(done, total, "", None),
        )
    if not as_json:
        _tell(result, compared=against is not None or engine is not None)
    comparison = served = None
    if result.ok and against is not None:
        from qplug.reading.compare import compare

        comparison = compare(
            folder,
            against,
            backend=backend,
            dataset=dataset,
            dataset_options=parse_pairs(dataset_options, "--dataset-opt"),
            windows=windows,
            seq_len=seq_len,
            max_kl=max_kl,
            min_top1=min_top1,
            device=device,
            trust_remote_code=trust_remote_code,
            registry=registry,
        )
        if not as_json:
            _tell_comparison(comparison)
    if result.ok and engine is not None:
        from qplug.reading.engine import check_engine

        served = check_engine(
            folder,
            backend=backend if engine == _OWN else engine,
            python=python,
            arguments=arguments,
            dataset=dataset,
            dataset_options=parse_pairs(dataset_options, "--dataset-opt"),
            windows=windows,
            seq_len=seq_len,
            device=device,
            trust_remote_code=trust_remote_code,
            registry=registry,
        )
        if not as_json:
            _tell_engine(served)
    found = [part for part in (result, comparison, served) if part is not None]
    ok = all(part.ok for part in found)
    if as_json:
        told = {
            **dataclasses.asdict(result),
            "comparison": comparison and dataclasses.asdict(comparison),
            "engine": served and dataclasses.asdict(served),
            "ok": ok,
        }
        click.echo(json.dumps(told, indent=2))
    if not ok:
        raise click.exceptions.Exit(1)


def _tell(result: Verification, *, compared: bool) -> None:
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
    if result.rewritten and not compared:
        told = f"{result.rewritten} layers hold rewritten weights"
        click.echo(f"{told}: compare what they compute with --against {result.against or 'MODEL'}")
    elif result.ok and not result.errors and not compared:
        click.echo("not compared: the float model is not at hand; name it with --against")


def _verdict(ok: bool, backend: str, linears: int, problems: int) -> str:
    if ok:
        return f"sound: {linears} quantized layers, as {backend} loads them"
    return f"not sound: {problems} problems for {backend}"


def _tell_comparison(found: Comparison) -> None:
    verdict = "computes alike" if found.ok else "does not compute alike"
    click.echo(
        f"{verdict}: on {found.tokens} tokens, KL divergence {found.kl:.4f} (up to "
        f"{found.max_kl:g}), top-1 agreement {found.top1:.3f} (from {found.min_top1:g})"
    )
    if found.note:
        click.echo(found.note)
    for name in found.worst():
        block = found.blocks[name]
        click.echo(
            f"  {name}: off by {block.alone:.4f} of what it adds; "
            f"hidden states behind it by {block.total:.4f}"
        )


def _tell_engine(found: EngineCheck) -> None:
    for warning in found.warnings:
        click.echo(f"Warning: {warning}", err=True)
    verdict = "serves alike" if found.ok else "does not serve alike"
    click.echo(
        f"{found.engine} {verdict}: on {found.tokens} tokens, log-probabilities differ by "
        f"{found.difference:.4f} (up to {found.limit:.3g}); perplexity {found.perplexity:.4f}, "
        f"qplug's reader {found.perplexity_read:.4f}"
    )
