"""The options of ``qplug eval --tasks``, and the table that it prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qplug.cli.headed import HeadedOption
from qplug.cli.printed_table import print_table
from qplug.cli.printing import note, say_json
from qplug.cli.progress import progress_bar
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from qplug.evaluation.harness import TaskScore
    from qplug.evaluation.recovery import Recovery
    from qplug.evaluation.tasks import TaskRow, TaskScores

F = TypeVar("F", bound=Callable[..., Any])


def _option(*words: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*words, cls=HeadedOption, heading="Tasks of lm-eval", **settings)


_OPTIONS = (
    _option(
        "--tasks",
        metavar="NAME,...",
        help="Run these tasks, groups or YAML files in place of perplexity: gsm8k,mmlu.",
    ),
    _option(
        "--include-path",
        type=click.Path(path_type=Path),
        help="A folder with YAML files that define further tasks.",
    ),
    _option("--limit", type=click.IntRange(1), help="The most items of each task.  [default: all]"),
    _option(
        "--shots",
        type=click.IntRange(0),
        help="Solved examples before each item.  [default: the task's own number]",
    ),
    _option("--chat", is_flag=True, help="Send prompts through the chat template."),
    _option("--engine", metavar="BACKEND", help="Start this engine for each model: vllm, sglang."),
    _option("--python", help="The Python that has the engine; see qplug serve."),
    _option("--url", help="Ask the server that runs MODEL at this address."),
    _option("--base-url", help="Ask the server that runs the model of --base at this address."),
)


def task_options(command: F) -> F:
    """Decorates a command with the options of ``TaskOptions``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class TaskOptions:
    """The values of the options that ``task_options`` adds."""

    tasks: str
    include_path: Path | None
    limit: int | None
    shots: int | None
    chat: bool
    engine: str | None
    python: str | None
    url: str | None
    base_url: str | None

    def run(
        self,
        model: str,
        registry: Registry,
        *,
        base: str | None,
        batch_size: int,
        device: str,
        trust_remote_code: bool,
    ) -> TaskScores:
        """Returns the scores of ``model`` and of ``base``, and shows progress.

        Raises QplugError as ``evaluate_tasks`` does.
        """
        if not (sys.stderr.isatty() and (self.engine or self.url)):
            # lm-eval's own bars: the only ones while an engine answers, and else one too many.
            # tqdm reads the variable when it is imported.
            os.environ.setdefault("TQDM_DISABLE", "1")
        from qplug.evaluation.tasks import evaluate_tasks

        with progress_bar("tasks") as bar:
            return evaluate_tasks(
                model,
                [name.strip() for name in self.tasks.split(",") if name.strip()],
                base=base,
                include_path=self.include_path,
                limit=self.limit,
                shots=self.shots,
                chat=self.chat,
                batch_size=batch_size,
                engine=self.engine,
                python=self.python,
                url=self.url,
                base_url=self.base_url,
                device=device,
                trust_remote_code=trust_remote_code,
                registry=registry,
                watch=lambda name, done, count, kind: bar(done, count, f"{name}: {kind}", None),
            )


def print_scores(scores: TaskScores, *, as_json: bool) -> None:
    """Prints ``scores`` as a table, or as JSON."""
    if as_json:
        rows = [_plain(row) for row in scores.rows]
        by = {"model": scores.model, "base": scores.base, "by": scores.by}
        say_json({**by, "rows": rows})
        return
    columns = ["task", "metric", "items"]
    columns += ["base", "quantized", "recovery"] if scores.base else ["score"]
    print_table([columns, *(_cells(row) for row in scores.rows)])
    if any(row.recovery for row in scores.rows):
        note("recovery: quantized / base; ±: standard errors, where lm-eval gives them")


def _cells(row: TaskRow) -> list[str]:
    score = row.quantized
    direction = " (lower is better)" if score.higher_is_better is False else ""
    cells = [score.task, score.metric + direction, str(score.count)]
    if row.base is not None:
        cells.append(_value(row.base))
    cells.append(_value(score))
    if row.base is not None:
        cells.append(_share(row.recovery))
    return cells


def _value(score: TaskScore) -> str:
    error = score.score.stderr
    return f"{score.score.value:.4f}" + ("" if error is None else f" ±{error:.4f}")


def _share(recovery: Recovery | None) -> str:
    if recovery is None:
        return "-"
    error = "" if recovery.stderr is None else f" ±{100 * recovery.stderr:.1f}"
    return f"{100 * recovery.value:.1f}%{error}"


def _plain(row: TaskRow) -> dict[str, Any]:
    """Returns ``row`` for JSON, without the score of each item."""
    kept = row.recovery
    return {
        "task": row.quantized.task,
        "metric": row.quantized.metric,
        "items": row.quantized.count,
        "higher_is_better": row.quantized.higher_is_better,
        "quantized": _number(row.quantized),
        "base": _number(row.base) if row.base else None,
        "recovery": {"value": kept.value, "stderr": kept.stderr, "paired": kept.paired}
        if kept
        else None,
    }


def _number(score: TaskScore) -> dict[str, float | None]:
    return {"value": score.score.value, "stderr": score.score.stderr}
