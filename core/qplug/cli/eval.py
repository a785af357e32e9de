"""``qplug eval``."""

from __future__ import annotations

import dataclasses

import click

from qplug.cli.printing import Command, say, say_json
from qplug.cli.text_options import TextOptions, text_options
from qplug.registry.registry import Registry


@click.command(name="eval", cls=Command)
@click.argument("model")
@text_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    registry: Registry,
    model: str,
    dataset: str,
    dataset_options: tuple[str, ...],
    seq_len: int,
    windows: int,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL, float or quantized.

    The text is tokenised once, without special tokens. Its first windows, which do not overlap,
    are evaluated one by one in float32, with dequantized weights, and with activations rounded as
    the scheme says.
    """
    text = TextOptions(dataset, dataset_options, seq_len, windows, device, trust_remote_code)
    result = text.measure(model, registry)
    if as_json:
        say_json(dataclasses.asdict(result))
    else:
        measured_on = f"{result.windows} windows of {result.seq_len} tokens of {result.dataset}"
        say(f"{model}: perplexity {result.perplexity:.4f} ({measured_on})")
