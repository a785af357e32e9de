"""The options of commands that measure perplexity: the text, and the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qplug.api.params import parse_pairs
from qplug.cli.completion import datasets
from qplug.cli.progress import progress_bar
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from qplug.api.events import Quality
    from qplug.reading.perplexity import Evaluation

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--dataset",
        shell_complete=datasets,
        default="demo",
        show_default=True,
        help="The text for perplexity.",
    ),
    click.option(
        "--dataset-opt",
        "dataset_options",
        metavar="K=V",
        multiple=True,
        help="An option of the dataset. May be repeated.",
    ),
    click.option(
        "--seq-len",
        default=512,
        show_default=True,
        type=click.IntRange(2),
        help="Tokens of a window.",
    ),
    click.option(
        "--windows",
        default=64,
        show_default=True,
        type=click.IntRange(1),
        help="Windows to measure.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, or cuda[:N]."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."
    ),
)


def text_options(command: F) -> F:
    """Decorates a command with the options of ``TextOptions``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class TextOptions:
    """The values of the options that ``text_options`` adds."""

    dataset: str
    dataset_options: tuple[str, ...]
    seq_len: int
    windows: int
    device: str
    trust_remote_code: bool

    def check(self, folder: str, against: str, registry: Registry) -> Quality:
        """Returns how far the quantized ``folder`` is from its float model ``against``.

        Raises QplugError as ``qplug.evaluate`` does.
        """
        from qplug.machine.session import Session
        from qplug.reading.perplexity import evaluation_tokens
        from qplug.reading.quality import measure_quality

        session = Session.alone(
            self.device, registry=registry, trust_remote_code=self.trust_remote_code
        )
        tokens = evaluation_tokens(
            folder,
            session,
            dataset=self.dataset,
            dataset_options=parse_pairs(self.dataset_options, "--dataset-opt"),
            seq_len=self.seq_len,
            windows=self.windows,
        )
        return measure_quality(folder, against, tokens, self.dataset, session)

    def measure(self, model: str, registry: Registry) -> Evaluation:
        """Returns the perplexity of ``model``, and shows progress while it is measured.

        Raises QplugError as ``qplug.evaluate`` does.
        """
        from qplug.reading.perplexity import evaluate

        with progress_bar(f"evaluating {model}") as bar:
            return evaluate(
                model,
                dataset=self.dataset,
                dataset_options=parse_pairs(self.dataset_options, "--dataset-opt"),
                seq_len=self.seq_len,
                windows=self.windows,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                registry=registry,
                watch=lambda done, total: bar(done, total, "", None),
            )
