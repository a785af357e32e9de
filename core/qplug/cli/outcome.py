"""Prints the outcome of a run: the folder, its errors, its quality, and what to do next."""

from __future__ import annotations

from collections import Counter
from shlex import quote
from typing import TYPE_CHECKING

from qplug.cli.choice_lines import choice_lines
from qplug.cli.float_lines import float_lines, kept_float_lines
from qplug.cli.plan_text import data_warning, plan_paragraph
from qplug.cli.printing import say, warn
from qplug.cli.unfinished import kept

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from qplug.api.events import Quality, Result, RunStart


def tell_outcome(result: Result, start: RunStart | None = None, report: Path | None = None) -> None:
    """Prints the result of one run in a few lines.

    ``start`` is what the run found at its beginning; ``report`` is the file of the report on it.
    """
    out = result.out
    if result.source_format:
        say(f"source: is quantized ({result.source_format}); it was read as float")
    sizes = f"{result.source_bytes / 1e6:,.1f} MB -> {result.bytes / 1e6:,.1f} MB"
    if result.dry_run:
        say(f"{out}: would be written: {sizes}")
        if result.plan is not None:
            say(plan_paragraph(result.plan))
            if warning := data_warning(result.plan):
                warn(warning)
        _tell_choice(result, whole=True)
        _tell_floats(result)
        _tell_notes(result.notes)
        return
    if not result.errors:
        say(f"{out}: float weights, no layer quantized, {sizes}, {result.seconds:.1f} s")
        _tell_next(result, start, report)
        return
    resumed = ""
    if result.resumed:
        found = kept(start, result.resumed) if start is not None else f"{result.resumed} steps"
        resumed = f", {found} kept from an earlier run"
    say(f"{out}: {len(result.errors)} layers, {sizes}, {result.seconds:.1f} s{resumed}")
    say(_errors(result))
    _tell_choice(result, whole=False)
    for block in result.raised:
        say(block.sentence)
    _tell_floats(result)
    _tell_notes(result.notes)
    if result.quality is not None:
        say(quality_line(result.quality))
    _tell_next(result, start, report)


def _errors(result: Result) -> str:
    """One line on the errors of layers, which says of what they are the errors."""
    if result.losses:
        return (
            "outputs of layers, on the calibration data, differ from float by "
            f"{_mean_and_worst(result.losses)}"
        )
    return (
        f"weights of layers were rounded by {_mean_and_worst(result.errors)}; without calibration "
        "data nobody knows how much their outputs differ"
    )


def _mean_and_worst(errors: Mapping[str, float]) -> str:
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    return f"{mean:.1%} on average, {errors[worst]:.1%} at worst ({worst})"


def quality_line(quality: Quality) -> str:
    """One line on how far the result is from the float model: the verdict and its numbers."""
    change = quality.perplexity / quality.float_perplexity - 1
    return (
        f"quality: {quality.verdict}; perplexity {quality.perplexity:.4g} (float "
        f"{quality.float_perplexity:.4g}, {change:+.1%}), KL divergence {quality.kl:.4f} nats a "
        f"token, on {quality.windows} windows of {quality.seq_len} tokens of {quality.dataset} "
        "that calibration did not use"
    )


def _tell_next(result: Result, start: RunStart | None, report: Path | None) -> None:
    """Prints the commands that may come next."""
    serve = start.plan.serve if start is not None and start.plan is not None else ""
    for number, line in enumerate(_next(result.out, serve, report)):
        say(f"{'next:' if not number else '     '} {line}")


def _next(out: Path, serve: str, report: Path | None) -> Iterator[str]:
    folder = quote(str(out))
    yield f"qplug verify {folder}"
    if serve:
        yield serve.format(folder)
    yield f"open {report}" if report is not None else f"qplug report {folder}"


def _tell_notes(notes: Sequence[str]) -> None:
    """Prints the messages of a run to its user, each once."""
    for sentence, times in Counter(notes).items():
        say(f"note: {sentence}" + (f" ({times} times)" if times > 1 else ""))


def _tell_choice(result: Result, *, whole: bool) -> None:
    """Prints what ``--scheme auto`` chose; ``whole`` adds a line for each group of layers."""
    if result.choice is not None:
        for line in choice_lines(result.choice, whole=whole):
            say(line)


def _tell_floats(result: Result) -> None:
    """Prints which linears no kernel takes, and the share of the weights that is float."""
    for line in kept_float_lines(result.kept_float):
        say(line)
    for line in float_lines(result.float_share, result.floats):
        say(line)
