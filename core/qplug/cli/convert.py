"""``qplug convert``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from qplug.api.params import parse_pairs
from qplug.cli.completion import backends
from qplug.cli.printing import Command, say, say_json
from qplug.cli.progress import progress_bar
from qplug.cli.unfinished import telling_kept
from qplug.registry.registry import Registry


@click.command(name="convert", cls=Command)
@click.argument("folder")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    shell_complete=backends,
    required=True,
    help="Engine or format to write: see qplug schemes.",
)
@click.option("--backend-opt", "backend_options", metavar="K=V", multiple=True)
@click.option(
    "--shard-size",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Gigabytes in a file of weights.",
)
@click.option("--overwrite", is_flag=True, help="Replace the model in the folder OUT.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from FOLDER.")
@click.option("--dry-run", is_flag=True, help="Check all but the weights, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    registry: Registry,
    folder: str,
    out: Path,
    backend: str,
    backend_options: tuple[str, ...],
    shard_size: float,
    overwrite: bool,
    trust_remote_code: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the quantized FOLDER into the new folder OUT in the format of another backend.

    FOLDER may come from qplug or from another tool. Its codes and scales stay the same, to the bit.
    If the backend has no place for them, nothing is written: qplug quantize FOLDER reads FOLDER as
    a float model, and computes new codes.
    """
    from qplug.run.convert import convert

    with telling_kept(out) as unfinished, progress_bar("converting") as bar:
        result = convert(
            folder,
            out,
            backend=backend,
            backend_options=parse_pairs(backend_options, "--backend-opt"),
            shard_bytes=int(shard_size * 1e9),
            overwrite=overwrite,
            dry_run=dry_run,
            trust_remote_code=trust_remote_code,
            registry=registry.with_(bar, "progress-bar").with_(unfinished, "unfinished"),
        )
    if as_json:
        say_json({**dataclasses.asdict(result), "out": str(result.out)})
    elif dry_run:
        say(f"{out}: would be written: {result.bytes / 1e6:,.1f} MB from {result.source_format}")
    else:
        say(
            f"{out}: {len(result.errors)} layers keep their codes, from {result.source_format} "
            f"to {backend}, {result.bytes / 1e6:,.1f} MB, {result.seconds:.1f} s"
        )
        for sentence in result.notes:
            say(f"note: {sentence}")
