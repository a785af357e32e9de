"""``qplug eval``."""

from __future__ import annotations

import dataclasses
import json

import click

from qplug.params import parse_pairs
from qplug.progress import progress_bar
from qplug.registry import Registry


@click.command(name="eval")
@click.argument("model")
@click.option("--dataset", default="demo", show_default=True)
@click.option("--dataset-opt", "dataset_options", metavar="K=V", multiple=True)
@click.option("--seq-len", default=512, show_default=True, type=click.IntRange(2))
@click.option("--windows", default=64, show_default=True, type=click.IntRange(1))
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or cuda[:N].")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
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

    The text is tokenised once, without special tokens; the first windows that do not overlap are
    evaluated, each on its own, in float32. Weights are dequantized, and activations rounded as the
    scheme says.
    """
    from qplug.evaluation import evaluate

    with progress_bar("evaluating") as bar:
        result = evaluate(
            model,
            dataset=dataset,
            dataset_options=parse_pairs(dataset_options, "--dataset-opt"),
            seq_len=seq_len,
            windows=windows,
            device=device,
            trust_remote_code=trust_remote_code,
            registry=registry,
            watch=lambda done, total: bar(done, total, "", None),
        )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        told = f"{result.windows} windows of {result.seq_len} tokens of {result.dataset}"
        click.echo(f"{model}: perplexity {result.perplexity:.4f} ({told})")
