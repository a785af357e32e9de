"""``qplug eval``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from click.core import ParameterSource

from qplug.cli.headed import HeadedCommand, HeadedOption
from qplug.cli.printing import say, say_json
from qplug.cli.task_options import TaskOptions, print_scores, task_options
from qplug.cli.text_options import TextOptions, text_options
from qplug.errors import QplugError
from qplug.registry.registry import Registry

#: The options of each measure, by the option that asks for it; the first measure is the default.
_OF_PERPLEXITY = ("dataset", "dataset_options", "seq_len", "windows")
_OF_TASKS = ("include_path", "limit", "shots", "chat", "engine", "python", "url", "base_url")


@click.command(name="eval", cls=HeadedCommand)
@click.argument("model")
@text_options
@click.option(
    "--base",
    metavar="MODEL",
    cls=HeadedOption,
    help="The float model, for --tasks: measured too, and compared.",
)
@click.option(
    "--batch-size",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    cls=HeadedOption,
    help="Texts at a time, for --tasks.",
)
@task_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    dataset: str,
    dataset_options: tuple[str, ...],
    seq_len: int,
    windows: int,
    device: str,
    trust_remote_code: bool,
    base: str | None,
    batch_size: int,
    tasks: str | None,
    as_json: bool,
    include_path: Path | None,
    limit: int | None,
    shots: int | None,
    chat: bool,
    engine: str | None,
    python: str | None,
    url: str | None,
    base_url: str | None,
) -> None:
    """Measure the perplexity of MODEL, float or quantized, or its scores in tasks.

    Perplexity: the text is tokenised once, without special tokens. Its first windows, which do not
    overlap, are evaluated one by one in float32, with dequantized weights, and with activations
    rounded as the scheme says.

    --tasks: lm-eval (pip install 'qplug[eval]') asks qplug's reader, or an engine. With --base the
    float model answers too, and the table shows which share of its score MODEL keeps.
    """
    registry: Registry = ctx.obj
    if tasks is None:
        _refuse(ctx, ("base", "batch_size", *_OF_TASKS), "--tasks")
        text = TextOptions(dataset, dataset_options, seq_len, windows, device, trust_remote_code)
        result = text.measure(model, registry)
        if as_json:
            say_json(dataclasses.asdict(result))
        else:
            measured_on = f"{result.windows} windows of {result.seq_len} tokens of {result.dataset}"
            say(f"{model}: perplexity {result.perplexity:.4f} ({measured_on})")
        return
    _refuse(ctx, _OF_PERPLEXITY, "perplexity, not --tasks")
    options = TaskOptions(tasks, include_path, limit, shots, chat, engine, python, url, base_url)
    scores = options.run(
        model,
        registry,
        base=base,
        batch_size=batch_size,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    print_scores(scores, as_json=as_json)


def _refuse(ctx: click.Context, names: tuple[str, ...], other: str) -> None:
    """Raises QplugError if the user gives one of the options ``names``, which are for ``other``."""
    for param in ctx.command.params:
        given = param.name and ctx.get_parameter_source(param.name)
        if param.name in names and given is ParameterSource.COMMANDLINE:
            raise QplugError(f"{param.opts[0]}: is for {other}")
