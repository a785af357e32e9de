"""``qplug quantize``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qplug.api.params import parse_pairs
from qplug.api.scheme import CACHES
from qplug.cli.progress import progress_bar
from qplug.cli.report import write_report
from qplug.machine.launch import Launch
from qplug.recipe.recipe import SAMPLINGS
from qplug.registry.registry import Registry
from qplug.report.page_file import refuse_pages, report_file

if TYPE_CHECKING:
    from qplug.api.events import Result


@click.command(name="quantize")
@click.argument("model", required=False)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="A recipe, or an LLMC YAML file as it is; options given beside it win.",
)
@click.option("--algo", default="rtn", show_default=True, help="An algorithm, or A+B in order.")
@click.option("--scheme", default="W4A16", show_default=True, help="See qplug schemes.")
@click.option("--backend", default="sglang", show_default=True, help="Who shall serve it.")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder.")
@click.option("--group-size", type=int, help="Columns that share a scale; -1 is a whole row.")
@click.option(
    "-o", "options", metavar="ALGO.PARAM=V", multiple=True, help="See qplug plugins show ALGO."
)
@click.option("--backend-opt", "backend_options", metavar="K=V", multiple=True)
@click.option("--dataset", default="demo", show_default=True, help="What to calibrate on.")
@click.option("--dataset-opt", "dataset_options", metavar="K=V", multiple=True)
@click.option("--samples", default=128, show_default=True, type=click.IntRange(1))
@click.option("--seq-len", default=512, show_default=True, type=click.IntRange(1))
@click.option(
    "--propagate",
    default="quantized",
    show_default=True,
    type=click.Choice(["quantized", "float"]),
    help="What feeds a block in calibration: the blocks before it as they became, or as they were.",
)
@click.option("--batch-size", type=click.IntRange(1), help="Samples in one forward pass.")
@click.option(
    "--observer",
    default="minmax",
    show_default=True,
    type=click.Choice(["minmax", "moving-average", "histogram"]),
    help="How the ranges of static inputs are found.",
)
@click.option("--observer-opt", "observer_options", metavar="K=V", multiple=True)
@click.option("--kv-cache", type=click.Choice(list(CACHES)), help="Store scales for such a cache.")
@click.option(
    "--sampling",
    default="dataset",
    show_default=True,
    type=click.Choice(SAMPLINGS),
    help="How windows are cut: as the dataset does, or from all text, single or short documents.",
)
@click.option("--ignore", metavar="PATTERN", multiple=True, help="Leave these layers float.")
@click.option(
    "--override", "overrides", metavar="PATTERN=SCHEME", multiple=True, help="Another scheme."
)
@click.option("--use-qtorch", is_flag=True, help="Round floats by qtorch, for --backend fake.")
@click.option(
    "--shard-size",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Gigabytes in a file of weights.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or cuda[:N].")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
@click.option("--overwrite", is_flag=True, help="Replace a model that is at --out.")
@click.option("--dry-run", is_flag=True, help="Check everything, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option(
    "--report",
    metavar="[FILE]",
    is_flag=False,
    flag_value="",
    help="Write a page on the result; by default OUT.report.html.",
)
@click.pass_obj
def command(
    registry: Registry,
    model: str | None,
    config: Path | None,
    algo: str,
    scheme: str,
    backend: str,
    out: Path | None,
    group_size: int | None,
    options: tuple[str, ...],
    backend_options: tuple[str, ...],
    dataset: str,
    dataset_options: tuple[str, ...],
    samples: int,
    seq_len: int,
    propagate: str,
    batch_size: int | None,
    observer: str,
    observer_options: tuple[str, ...],
    kv_cache: str | None,
    sampling: str,
    ignore: tuple[str, ...],
    overrides: tuple[str, ...],
    use_qtorch: bool,
    shard_size: float,
    seed: int,
    device: str,
    trust_remote_code: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    report: str | None,
) -> None:
    """Quantize MODEL into the new folder --out.

    MODEL is a folder in Hugging Face's layout, a Hub id, or qplug:demo, a small Llama that ships
    with qplug. A run that was killed goes on when the same command is given again. Started by
    torchrun -m qplug, several processes share a calibrated run, each on a GPU of its own.

    A PATTERN is a glob over module names, or re: and a regular expression.
    """
    if config is not None:
        _run_config(registry, config, dry_run=dry_run, as_json=as_json, report=report)
        return
    for value, name in ((model, "MODEL"), (out, "--out")):
        if value is None:
            raise click.UsageError(f"Missing {name}: give it, or a recipe with --config.")
    assert model is not None
    assert out is not None
    from qplug.run.quantize import quantize

    if report is not None:
        refuse_pages(report, [out])

    with progress_bar("quantizing") as bar:
        result = quantize(
            model,
            out,
            algo=algo,
            scheme=scheme,
            backend=backend,
            group_size=group_size,
            dataset=dataset,
            dataset_options=parse_pairs(dataset_options, "--dataset-opt"),
            samples=samples,
            seq_len=seq_len,
            propagate=propagate,
            batch_size=batch_size,
            observer=observer,
            observer_options=parse_pairs(observer_options, "--observer-opt"),
            kv_cache=kv_cache,
            sampling=sampling,
            ignore=ignore,
            overrides=parse_pairs(overrides, "--override"),
            algorithm_options=_by_algorithm(options),
            backend_options=parse_pairs(backend_options, "--backend-opt"),
            use_qtorch=use_qtorch,
            shard_bytes=int(shard_size * 1e9),
            seed=seed,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            trust_remote_code=trust_remote_code,
            registry=registry.with_(bar, "progress-bar"),
        )
    if report is not None and not dry_run and Launch.of().is_first:
        file = report_file(report, out)
        write_report(str(out), file, registry, result=result, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(result), "out": str(result.out)}, indent=2))
        return
    _tell(result)


def _run_config(
    registry: Registry, file: Path, *, dry_run: bool, as_json: bool, report: str | None
) -> None:
    """The job in ``file``; of the command line, what was said and not what is usual."""
    from qplug.cli.quantize_config import run_config
    from qplug.recipe.override import Given
    from qplug.run.perform import How

    ctx = click.get_current_context()
    said = {
        name: value
        for name, value in ctx.params.items()
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    for name, flag in (("dataset_options", "--dataset-opt"), ("backend_options", "--backend-opt")):
        said[name] = parse_pairs(said.get(name, ()), flag)
    said["overrides"] = parse_pairs(said.get("overrides", ()), "--override")
    said["options"] = _by_algorithm(said.get("options", ()))
    fields = {field.name for field in dataclasses.fields(Given)}
    params = ctx.params
    how = How(
        device=params["device"],
        shard_bytes=int(params["shard_size"] * 1e9),
        overwrite=params["overwrite"],
        trust_remote_code=params["trust_remote_code"],
    )
    run_config(
        file,
        Given(**{name: value for name, value in said.items() if name in fields}),
        how,
        registry=registry,
        dry_run=dry_run,
        as_json=as_json,
        report=report,
        tell_result=_tell,
    )


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


def _by_algorithm(words: tuple[str, ...]) -> dict[str, dict[str, str]]:
    options: dict[str, dict[str, str]] = {}
    for key, value in parse_pairs(words, "-o").items():
        algorithm, dot, option = key.partition(".")
        if not (dot and option):
            raise click.BadParameter(f"{key}={value}: say ALGO.PARAM=V", param_hint="-o")
        options.setdefault(algorithm, {})[option] = value
    return options
