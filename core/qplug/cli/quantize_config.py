"""``qplug quantize --config``: a job from a file, changed by what the command line says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qplug.cli.config import tell
from qplug.cli.progress import progress_bar
from qplug.cli.report import write_report
from qplug.machine.launch import Launch
from qplug.registry.registry import Registry
from qplug.report.page_file import refuse_pages, report_file

if TYPE_CHECKING:
    from qplug.api.events import Result
    from qplug.reading.perplexity import Evaluation
    from qplug.recipe.override import Given
    from qplug.run.perform import Done, How

    Teller = Callable[[Result], None]


def run_config(
    file: Path,
    given: Given,
    how: How,
    *,
    registry: Registry,
    dry_run: bool,
    as_json: bool,
    report: str | None,
    tell_result: Teller,
) -> None:
    """Read, change and perform the job in ``file``, and print what became of it.

    ``report`` asks for a page on each folder that was written: "" or a file, where there is one.
    """
    from qplug.recipe.files import read_job
    from qplug.recipe.override import overridden
    from qplug.run.perform import perform

    read = read_job(file, registry)
    tell(read.warnings)
    job = overridden(read.job, given)
    if report is not None:
        refuse_pages(report, [export.out for export in job.exports])
    with progress_bar("") as bar:
        done = perform(
            job,
            device=how.device,
            shard_bytes=how.shard_bytes,
            overwrite=how.overwrite,
            dry_run=dry_run,
            trust_remote_code=how.trust_remote_code,
            registry=registry,
            watch=lambda what, n, total, name, loss: bar(n, total, f"{what} {name}", loss),
        )
    if report is not None and not dry_run and Launch.of().is_first:
        _write_reports(done, report, how, registry)
    if as_json:
        click.echo(json.dumps(_plain(done), indent=2))
        return
    for folder in done.kept:
        click.echo(f"{folder}: was written by an earlier run")
    for result in done.results:
        tell_result(result)
    for measured in done.measured:
        found = measured.evaluation
        told = f"{found.windows} windows of {found.seq_len} tokens of {found.dataset}"
        click.echo(f"{measured.at}: perplexity {found.perplexity:.4f} ({told})")


def _write_reports(done: Done, report: str, how: How, registry: Registry) -> None:
    """A page on each folder, with what was measured of the model before and after."""
    stages = {"pretrain": "float", "transformed": "transformed", "quantized": "quantized"}
    measured: dict[str, list[Evaluation]] = {}
    for found in done.measured:
        measured.setdefault(stages[found.at], []).append(found.evaluation)
    for result in done.results:
        write_report(
            str(result.out),
            report_file(report, result.out),
            registry,
            trust_remote_code=how.trust_remote_code,
            measured=measured,
            result=result,
        )


def _plain(done: Done) -> dict[str, object]:
    return {
        "results": [
            {**dataclasses.asdict(result), "out": str(result.out)} for result in done.results
        ],
        "measured": [
            {"at": measured.at, **dataclasses.asdict(measured.evaluation)}
            for measured in done.measured
        ],
        "kept": [str(folder) for folder in done.kept],
    }
