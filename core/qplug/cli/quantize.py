"""``qplug quantize``."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qplug.cli.choice import Choice
from qplug.cli.chosen import (
    AUTO,
    better_dataset,
    chosen_algorithm,
    chosen_dataset,
    chosen_line,
)
from qplug.cli.config import tell
from qplug.cli.headed import HeadedCommand, HeadedOption
from qplug.cli.outcome import tell_outcome
from qplug.cli.printing import note, say, say_json
from qplug.cli.recipe_options import recipe_options, typed_words, usual_words
from qplug.cli.report import write_report
from qplug.cli.run_progress import RunProgress, run_progress
from qplug.cli.unfinished import telling_kept
from qplug.machine.launch import Launch
from qplug.machine.read_ahead import read_ahead
from qplug.registry.registry import Registry
from qplug.report.page_file import refuse_pages, report_file

if TYPE_CHECKING:
    from qplug.api.events import Result
    from qplug.reading.perplexity import Evaluation
    from qplug.recipe.words import RecipeWords
    from qplug.run.perform import JobResult, RunOptions
    from qplug.run.stop_at import OnStop

_run_option = partial(click.option, cls=HeadedOption)
_result_option = partial(click.option, cls=HeadedOption, heading="Model and output")


@click.command(name="quantize", cls=HeadedCommand)
@click.argument("model", required=False)
@_result_option(
    "--out",
    type=click.Path(path_type=Path),
    help="A new folder; missing folders above it are made.",
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
    help="Replace the model in the folder --out.",
)
@_result_option(
    "--report",
    metavar="[FILE]",
    is_flag=False,
    flag_value="",
    help="Write an HTML report on the result to FILE, by default OUT.report.html.",
)
@_result_option(
    "--trust-remote-code", is_flag=True, help="Run Python code from the model's folder."
)
@click.option(
    "--config",
    cls=HeadedOption,
    heading="Recipe",
    type=click.Path(path_type=Path),
    help="A recipe or an unchanged LLMC YAML file; options on the command line win over it.",
)
@recipe_options
@_run_option("--device", default="auto", show_default=True, help="auto, cpu, or cuda[:N].")
@_run_option(
    "--memory",
    metavar="SIZE",
    help="What a block may take on the device, such as 20GiB; by default what is free.",
)
@_run_option(
    "--stop-at",
    metavar="DISTANCE",
    type=click.FloatRange(0, min_open=True),
    help="Stop after a block whose output is further from the float model's, such as 0.3.",
)
@_run_option(
    "--on-stop",
    type=Choice(["stop", "raise"]),
    default="stop",
    show_default=True,
    help="What --stop-at does: raise gives the block more bits (4, 8, float), and goes on.",
)
@_run_option(
    "--check/--no-check",
    default=True,
    help="Measure perplexity and KL divergence from the float model afterwards, on a little text.",
)
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
    memory: str | None,
    trust_remote_code: bool,
    stop_at: float | None,
    on_stop: OnStop,
    check: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL into the new folder --out.

    MODEL is a folder in Hugging Face's layout, a Hub id, or qplug:demo, a small Llama that ships
    with qplug. If a run was killed, the same command continues it. Started by torchrun -m qplug,
    several processes share a calibrated run, each on its own GPU.

    A PATTERN is a glob over module names, or re: and a regular expression.
    """
    words, registry = typed_words(ctx), ctx.obj
    # Whether the run itself needs the code of models is known when the algorithms are.
    computes = (check or report is not None) and not dry_run
    read_ahead("torch", *(("models",) if computes else ()))
    _tell_aliases(words)
    for value, name in ((model, "MODEL"), (out, "--out")):
        if value is None and config is None:
            raise click.UsageError(f"Missing {name}: give {name}, or a recipe with --config.")
    usual = usual_words(ctx) if config is None else {}
    for word, default in usual.items():
        note(f"--{word} {default}: your default")
    with run_progress(f"opening {model or config}") as progress:  # before torch is imported
        from qplug.run.perform import RunOptions

        size = int(shard_size * 1e9)
        options = RunOptions(
            device, size, overwrite, trust_remote_code, memory, check, stop_at, on_stop
        )
        if config is not None:
            job = _from_file(
                config, words, model, out, options, registry, dry_run, report, progress
            )
        else:
            assert model is not None
            assert out is not None
            words = _with_algorithm({**usual, **words}, registry)
            words = _with_dataset(words, model, out, registry, overwrite=overwrite)
            result = _from_words(words, model, out, options, registry, dry_run, report, progress)
    if as_json:
        say_json(_plain(job) if config is not None else _plain_result(result))
    elif config is not None:
        _tell_all(job, progress, report)
    else:
        _tell(result, progress, report)


def _with_algorithm(words: RecipeWords, registry: Registry) -> RecipeWords:
    """``words`` with the algorithm that qplug chooses if they name none, which is said."""
    algorithm = chosen_algorithm(words, registry)
    if algorithm is None:
        return words
    note(chosen_line(algorithm, words))
    return {**words, "algo": algorithm}


def _with_dataset(
    words: RecipeWords, model: str, out: Path, registry: Registry, *, overwrite: bool
) -> RecipeWords:
    """``words`` with the dataset that qplug chooses if they name none, or auto, which is said."""
    chosen = better_dataset(words, model, out, registry, overwrite=overwrite)
    if words.get("dataset") == AUTO:
        chosen = chosen_dataset(registry)
    if chosen is None:
        return words
    dataset, line = chosen
    note(line)
    return {**words, "dataset": dataset}


def _tell_aliases(words: RecipeWords) -> None:
    """Print the name of each scheme that the user typed in another spelling."""
    from qplug.api.scheme import ALIASES

    for typed in dict.fromkeys((words.get("scheme"), *(words.get("overrides") or {}).values())):
        if isinstance(typed, str) and typed in ALIASES:
            note(f"{typed} is the scheme {ALIASES[typed]}")


def _from_words(
    words: RecipeWords,
    model: str,
    out: Path,
    options: RunOptions,
    registry: Registry,
    dry_run: bool,
    report: str | None,
    progress: RunProgress,
) -> Result:
    """Quantize ``model`` into ``out`` by the recipe that ``words`` describe."""
    from qplug.run.quantize import quantize

    if report is not None:
        refuse_pages(report, [out])
    with telling_kept(out) as unfinished:
        result = quantize(
            model,
            out,
            shard_bytes=options.shard_bytes,
            device=options.device,
            overwrite=options.overwrite,
            dry_run=dry_run,
            trust_remote_code=options.trust_remote_code,
            memory=options.memory,
            check=options.check,
            stop_at=options.stop_at,
            on_stop=options.on_stop,
            registry=registry.with_(progress, "progress").with_(unfinished, "unfinished"),
            **words,
        )
    if report is not None and not dry_run and Launch.of().is_first:
        file = report_file(report, out)
        write_report(
            str(out), file, registry, result=result, trust_remote_code=options.trust_remote_code
        )
    return result


def _from_file(
    file: Path,
    words: RecipeWords,
    model: str | None,
    out: Path | None,
    options: RunOptions,
    registry: Registry,
    dry_run: bool,
    report: str | None,
    progress: RunProgress,
) -> JobResult:
    """Run the job in ``file``, changed by the options that the user typed, and return its results.

    Unless ``report`` is None, a report is written for each folder: to the file that ``report``
    names, or next to the folder if ``report`` is "".
    """
    from qplug.recipe.files import read_job
    from qplug.recipe.words import changed_job
    from qplug.run.perform import perform

    read = read_job(file, registry)
    tell(read.warnings)
    job = changed_job(read.job, words, model=model, out=out)
    if report is not None:
        refuse_pages(report, [export.out for export in job.exports])

    def watch(what: str, number: int, total: int, name: str, loss: float | None) -> None:
        if what.startswith("measuring"):  # blocks are shown by the plugin
            progress.measured(what, number, total)

    with telling_kept(None) as unfinished:
        done = perform(
            job,
            device=options.device,
            shard_bytes=options.shard_bytes,
            overwrite=options.overwrite,
            dry_run=dry_run,
            trust_remote_code=options.trust_remote_code,
            memory=options.memory,
            check=options.check,
            stop_at=options.stop_at,
            on_stop=options.on_stop,
            registry=registry.with_(progress, "progress").with_(unfinished, "unfinished"),
            watch=watch,
        )
    if report is not None and not dry_run and Launch.of().is_first:
        _write_reports(done, report, options, registry)
    return done


def _write_reports(done: JobResult, report: str, options: RunOptions, registry: Registry) -> None:
    """Write a report for each folder, with the perplexities that the job measured."""
    stages = {"pretrain": "float", "transformed": "transformed", "quantized": "quantized"}
    measured: dict[str, list[Evaluation]] = {}
    for measurement in done.measured:
        measured.setdefault(stages[measurement.at], []).append(measurement.evaluation)
    for result in done.results:
        write_report(
            str(result.out),
            report_file(report, result.out),
            registry,
            trust_remote_code=options.trust_remote_code,
            measured=measured,
            result=result,
        )


def _plain(done: JobResult) -> dict[str, object]:
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


def _tell_all(done: JobResult, progress: RunProgress, report: str | None) -> None:
    """Print the results of a job: a few lines for each folder, one for each measurement."""
    for folder in done.kept:
        say(f"{folder}: was written by an earlier run")
    for result in done.results:
        _tell(result, progress, report)
    for measured in done.measured:
        evaluation = measured.evaluation
        text = (
            f"{evaluation.windows} windows of {evaluation.seq_len} tokens of {evaluation.dataset}"
        )
        say(f"{measured.at}: perplexity {evaluation.perplexity:.4f} ({text})")


def _tell(result: Result, progress: RunProgress, report: str | None) -> None:
    """Print the result of one run."""
    page = None if report is None else report_file(report, result.out)
    tell_outcome(result, progress.starts.get(result.out), page)
