"""``qplug eval``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from click.core import ParameterSource

from qplug.cli.behaviour import print_behaviour, watch_behaviour
from qplug.cli.headed import HeadedCommand, HeadedOption
from qplug.cli.printing import say, say_json
from qplug.cli.task_options import TaskOptions, print_scores, task_options
from qplug.cli.text_options import TextOptions, text_options
from qplug.errors import QplugError
from qplug.machine.read_ahead import read_ahead
from qplug.registry.registry import Registry

#: The heading of the options of the suite of behaviour.
BEHAVIOUR = "Behaviour"

#: The options that only one or two of the measures take, by name.
_OF_PERPLEXITY = ("dataset", "dataset_options", "seq_len", "windows")
_OF_TASKS = ("include_path", "limit", "shots", "chat", "engine", "python", "url", "base_url")


@click.command(name="eval", cls=HeadedCommand)
@click.argument("model")
@text_options
@click.option(
    "--base",
    metavar="MODEL",
    cls=HeadedOption,
    help="The float model, for --tasks and --behaviour: measured too.",
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
@click.option(
    "--behaviour",
    is_flag=True,
    cls=HeadedOption,
    heading=BEHAVIOUR,
    help="Ask the prompts of a small suite in place of perplexity.",
)
@click.option(
    "--answer-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(16),
    cls=HeadedOption,
    heading=BEHAVIOUR,
    help="The most tokens of an answer.",
)
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
    include_path: Path | None,
    limit: int | None,
    shots: int | None,
    chat: bool,
    engine: str | None,
    python: str | None,
    url: str | None,
    base_url: str | None,
    behaviour: bool,
    answer_tokens: int,
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL, its scores in tasks, or its behaviour in chats.

    Perplexity: the text is tokenised once, without special tokens. Its first windows, which do not
    overlap, are evaluated one by one in float32, with dequantized weights, and with activations
    rounded as the scheme says.

    --tasks: lm-eval (pip install 'qplug[eval]') asks qplug's reader, or an engine. With --base the
    float model answers too, and the table shows which share of its score MODEL keeps.

    --behaviour: counts of answers that close </think>, that call tools in valid JSON, that do not
    end in a loop, and that find a needle in 8192 tokens, or as many as MODEL reads. No network is
    needed, and parts that do not apply say why.
    """
    registry: Registry = ctx.obj
    read_ahead("torch", "models")
    if behaviour:
        refused = ("tasks", *_OF_TASKS, *_OF_PERPLEXITY, "batch_size")
        _refuse(ctx, refused, "another measure than --behaviour")
        watched = watch_behaviour(
            model,
            registry,
            base=base,
            tokens=answer_tokens,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        print_behaviour(watched, as_json=as_json)
    elif tasks is not None:
        _refuse(ctx, (*_OF_PERPLEXITY, "answer_tokens"), "another measure than --tasks")
        options = TaskOptions(
            tasks, include_path, limit, shots, chat, engine, python, url, base_url
        )
        scores = options.run(
            model,
            registry,
            base=base,
            batch_size=batch_size,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        print_scores(scores, as_json=as_json)
    else:
        _refuse(ctx, (*_OF_TASKS, "batch_size"), "--tasks")
        _refuse(ctx, ("base",), "--tasks and --behaviour")
        _refuse(ctx, ("answer_tokens",), "--behaviour")
        text = TextOptions(dataset, dataset_options, seq_len, windows, device, trust_remote_code)
        result = text.measure(model, registry)
        if as_json:
            say_json(dataclasses.asdict(result))
            return
        measured_on = f"{result.windows} windows of {result.seq_len} tokens of {result.dataset}"
        say(f"{model}: perplexity {result.perplexity:.4f} ({measured_on})")


def _refuse(ctx: click.Context, names: tuple[str, ...], other: str) -> None:
    """Raises QplugError if the user gives one of the options ``names``, which are for ``other``."""
    for param in ctx.command.params:
        given = param.name and ctx.get_parameter_source(param.name)
        if param.name in names and given is ParameterSource.COMMANDLINE:
            raise QplugError(f"{param.opts[0]}: is for {other}")
