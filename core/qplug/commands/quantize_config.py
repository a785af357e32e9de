"""``qplug quantize --config``: a job from a file, changed by what the command line says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qplug.commands.config import tell
from qplug.progress import progress_bar
from qplug.registry import Registry

if TYPE_CHECKING:
    from qplug.configs.override import Given
    from qplug.events import Result
    from qplug.job_run import Done, How

    Teller = Callable[[Result], None]


def run_config(
    file: Path,
    given: Given,
    how: How,
    *,
    registry: Registry,
    dry_run: bool,
    as_json: bool,
    tell_result: Teller,
) -> None:
    """Read, change and perform the job in ``file``, and print what became of it."""
    from qplug.configs.override import overridden
    from qplug.configs.reading import read_job
    from qplug.job_run import perform

    read = read_job(file, registry)
    tell(read.warnings)
    job = overridden(read.job, given)
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
