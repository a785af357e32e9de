"""``qplug quantize``."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qplug.cli.config import tell
from qplug.cli.headed import HeadedCommand, HeadedOption
from qplug.cli.progress import progress_bar
from qplug.cli.recipe_options import recipe_options, said
from qplug.cli.report import write_report
from qplug.machine.launch import Launch
from qplug.registry.registry import Registry
from qplug.report.page_file import refuse_pages, report_file

if TYPE_CHECKING:
    from qplug.api.events import Result
    from qplug.reading.perplexity import Evaluation
    from qplug.recipe.words import RecipeWords
    from qplug.run.perform import Done, How

_run_option = partial(click.option, cls=HeadedOption)
_result_option = partial(click.option, cls=HeadedOption, heading="Result")


@click.command(name="quantize", cls=HeadedCommand)
@click.argument("model", required=False)
@click.option(
    "--config",
    cls=HeadedOption,
    heading="Recipe",
    type=click.Path(path_type=Path),
    help="A recipe, or an LLMC YAML file as it is; options given beside it win.",
)
@recipe_options
@_result_option(
    "--out",
    type=click.Path(path_type=Path),
    help="A new folder.",
)
@_result_option(
    "--shard-size",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Gigabytes in a file of weights.",
)
@_result_option(
    "--overwrite",
    is_flag=True,
    help="Replace a model that is at --out.",
)
@_result_option(
    "--report",
    metavar="[FILE]",
    is_flag=False,
    flag_value="",
    help="Write a page on the result; by default OUT.report.html.",
)
@_run_option("--device", default="auto", show_default=True, help="auto, cpu, or cuda[:N].")
@_run_option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
@_run_option("--dry-run", is_flag=True, help="Check everything, and write nothing.")
@_run_option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    config: Path | None,
    out: Path | None,
    shard_size: float,
    overwrite: bool,
    report: str | None,
    device: str,
    trust_remote_code: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL into the new folder --out.

    MODEL is a folder in Hugging Face's layout, a Hub id, or qplug:demo, a small Llama that ships
    with qplug. A run that was killed goes on when the same command is given again. Started by
    torchrun -m qplug, several processes share a calibrated run, each on a GPU of its own.

    A PATTERN is a glob over module names, or re: and a regular expression.
    """
    from qplug.run.perform import How

    how = How(device, int(shard_size * 1e9), overwrite, trust_remote_code)
    words, registry = said(ctx), ctx.obj
    if config is not None:
        done = _from_file(config, words, model, out, how, registry, dry_run, report)
        if as_json:
            click.echo(json.dumps(_plain(done), indent=2))
        else:
            _tell_all(done)
        return
    for value, name in ((model, "MODEL"), (out, "--out")):
        if value is None:
            raise click.UsageError(f"Missing {name}: give it, or a recipe with --config.")
    assert model is not None
    assert out is not None
    result = _from_words(words, model, out, how, registry, dry_run, report)
    if as_json:
        click.echo(json.dumps(_plain_result(result), indent=2))
    else:
        _tell(result)


def _from_words(
    words: RecipeWords,
    model: str,
    out: Path,
    how: How,
    registry: Registry,
    dry_run: bool,
    report: str | None,
) -> Result:
    """Quantize ``model`` into ``out`` as ``words`` say."""
    from qplug.run.quantize import quantize

    if report is not None:
        refuse_pages(report, [out])
    with progress_bar("quantizing") as bar:
        result = quantize(
            model,
            out,
            shard_bytes=how.shard_bytes,
            device=how.device,
            overwrite=how.overwrite,
            dry_run=dry_run,
            trust_remote_code=how.trust_remote_code,
            registry=registry.with_(bar, "progress-bar"),
            **words,
        )
    if report is not None and not dry_run and Launch.of().is_first:
        file = report_file(report, out)
        write_report(
            str(out), file, registry, result=result, trust_remote_code=how.trust_remote_code
        )
    return result


def _from_file(
    file: Path,
    words: RecipeWords,
    model: str | None,
    out: Path | None,
    how: How,
    registry: Registry,
    dry_run: bool,
    report: str | None,
) -> Done:
    """Perform the job in ``file``, changed by what was typed; defaults do not count.

    ``report`` asks for a page on each folder that was written: "" or a file, where there is one.
    """
    from qplug.recipe.files import read_job
    from qplug.recipe.words import changed_job
    from qplug.run.perform import perform

    read = read_job(file, registry)
    tell(read.warnings)
    job = changed_job(read.job, words, model=model, out=out)
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
    return done


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
        "results": [_plain_result(result) for result in done.results],
        "measured": [
            {"at": measured.at, **dataclasses.asdict(measured.evaluation)}
            for measured in done.measured
        ],
        "kept": [str(folder) for folder in done.kept],
    }


def _plain_result(result: Result) -> dict[str, object]:
    return {**dataclasses.asdict(result), "out": str(result.out)}


def _tell_all(done: Done) -> None:
    """What became of a job, in a few lines for each folder and measurement."""
    for folder in done.kept:
        click.echo(f"{folder}: was written by an earlier run")
    for result in done.results:
        _tell(result)
    for measured in done.measured:
        found = measured.evaluation
        told = f"{found.windows} windows of {found.seq_len} tokens of {found.dataset}"
        click.echo(f"{measured.at}: perplexity {found.perplexity:.4f} ({told})")


def _tell(result: Result) -> None:
    """What became of a run, in a few lines."""
    out = result.out
    sizes = f"{result.source_bytes / 1e6:,.1f} MB -> {result.bytes / 1e6:,.1f} MB"
    if result.dry_run:
        click.echo(f"{out}: would be written: {sizes}")
        return
    if not result.errors:
        click.echo(f"{out}: float, nothing is quantized, {sizes}, {result.seconds:.1f} s")
        return
    losses = result.losses or result.errors
    worst = max(losses, key=lambda name: losses[name])
    mean = sum(losses.values()) / len(losses)
    resumed = f", {result.resumed} steps of them done before" if result.resumed else ""
    click.echo(f"{out}: {len(result.errors)} layers, {sizes}, {result.seconds:.1f} s{resumed}")
    of_what = "outputs on the calibration data" if result.losses else "weights"
    told = f"mean {mean:.4f}, worst {losses[worst]:.4f} ({worst})"
    click.echo(f"relative error of {of_what}: {told}")
    for note in result.notes:
        click.echo(f"note: {note}")
