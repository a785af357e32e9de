"""``qplug verify``."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING

import click

from qplug.api.params import parse_pairs
from qplug.cli.completion import backends, datasets
from qplug.cli.float_lines import float_lines
from qplug.cli.printing import Command, say, say_json, warn
from qplug.cli.progress import progress_bar
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from qplug.reading.compare import Comparison
    from qplug.reading.engine import EngineCheck
    from qplug.reading.verify import Verification

_SHOWN = 20
#: The value of ``--engine`` without a name.
_OWN = "as written for"


@click.command(name="verify", cls=Command)
@click.argument("folder")
@click.argument("arguments", metavar="[-- ENGINE ARGS]", nargs=-1, type=click.UNPROCESSED)
@click.option("--against", metavar="MODEL", help="Compare outputs with this float model.")
@click.option(
    "--backend",
    shell_complete=backends,
    help="Check by its rules; default: the backend that wrote FOLDER.",
)
@click.option(
    "--engine",
    is_flag=False,
    flag_value=_OWN,
    metavar="[NAME]",
    help="Start this engine (vllm or sglang), and compare it with qplug's reader.",
)
@click.option(
    "--engine-version",
    metavar="V",
    help="Check by the rules of this version; default: the one that is installed, else the newest.",
)
@click.option("--python", metavar="PATH", help="The Python that has the engine.")
@click.option("--windows", default=4, show_default=True, type=click.IntRange(1))
@click.option("--seq-len", default=256, show_default=True, type=click.IntRange(2))
@click.option(
    "--dataset",
    shell_complete=datasets,
    default="demo",
    show_default=True,
    help="The text to compare on.",
)
@click.option("--dataset-opt", "dataset_options", metavar="K=V", multiple=True)
@click.option("--max-kl", default=0.3, show_default=True, help="Largest mean divergence, in nats.")
@click.option("--min-top1", default=0.7, show_default=True, help="Least agreement, 0 to 1.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or cuda[:N].")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    registry: Registry,
    folder: str,
    arguments: tuple[str, ...],
    against: str | None,
    backend: str | None,
    engine: str | None,
    engine_version: str | None,
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
    """Check that an engine can load FOLDER, and that FOLDER still is its float model.

    qplug checks every rule of the backend's loader on the files, then unpacks the codes and
    compares them with the float model that FOLDER records. --against runs both models on a few
    calibration windows, one block in memory at a time, and compares the outputs of the blocks and
    the predictions. --engine serves FOLDER for a moment and compares the log-probabilities of some
    text; arguments after -- are passed to the engine. The exit status is 1 if a check fails.
    """
    from qplug.reading.verify import verify

    with progress_bar("verifying") as bar:
        result = verify(
            folder,
            against=against,
            backend=backend,
            engine_version=engine_version,
            python=python,
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
    ok = all(check.ok for check in (result, comparison, served) if check is not None)
    if as_json:
        report = {
            **dataclasses.asdict(result),
            "comparison": comparison and dataclasses.asdict(comparison),
            "engine": served and dataclasses.asdict(served),
            "ok": ok,
        }
        say_json(report)
    if not ok:
        raise click.exceptions.Exit(1)


def _tell(result: Verification, *, compared: bool) -> None:
    from qplug.reading.verify import not_at_hand

    for problem in result.problems[:_SHOWN]:
        say(problem)
    if len(result.problems) > _SHOWN:
        say(f"... and {len(result.problems) - _SHOWN} more problems")
    say(_verdict(result.ok, result.backend, result.linears, len(result.problems)))
    if result.rules:
        say(result.rules)
    if not result.checksums:
        say("this folder has no checksums: damage to its codes cannot be noticed")
    for line in float_lines(result.float_share, result.floats):
        say(line)
    if result.errors:
        worst = max(result.errors, key=lambda name: result.errors[name])
        mean = sum(result.errors.values()) / len(result.errors)
        say(
            f"relative error against {result.against}: "
            f"mean {mean:.4f}, worst {result.errors[worst]:.4f} ({worst})"
        )
    if result.rewritten and not compared:
        say(
            f"{result.rewritten} layers have rewritten weights: compare their outputs with "
            f"--against {shlex.quote(result.against or result.missing or 'MODEL')}"
        )
    elif result.ok and not result.errors and not compared:
        why = not_at_hand(result.missing) if result.missing else "name the float model: --against"
        say(f"not compared: {why}")


def _verdict(ok: bool, backend: str, linears: int, problems: int) -> str:
    if ok:
        return f"sound: {linears} quantized layers, as {backend} loads them"
    return f"not sound: {problems} problems for {backend}"


def _tell_comparison(comparison: Comparison) -> None:
    verdict = "computes alike" if comparison.ok else "does not compute alike"
    say(
        f"{verdict}: on {comparison.tokens} tokens, KL divergence {comparison.kl:.4f} (up to "
        f"{comparison.max_kl:g}), top-1 agreement {comparison.top1:.3f} "
        f"(from {comparison.min_top1:g})"
    )
    if comparison.note:
        say(comparison.note)
    for name in comparison.worst():
        block = comparison.blocks[name]
        say(
            f"  {name}: block error {block.alone:.4f} (relative to its own contribution); "
            f"error of the hidden states after it {block.total:.4f}"
        )


def _tell_engine(check: EngineCheck) -> None:
    for warning in check.warnings:
        warn(warning)
    verdict = "serves alike" if check.ok else "does not serve alike"
    say(
        f"{check.engine} {verdict}: on {check.tokens} tokens, log-probabilities differ by "
        f"{check.difference:.4f} (up to {check.limit:.3g}); perplexity {check.perplexity:.4f}, "
        f"qplug's reader {check.perplexity_read:.4f}"
    )
