"""Tasks of lm-eval: finding them, running them on a model, and the scores that come of it.

lm-eval is imported when it is first needed: it is an extra.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qplug.errors import QplugError, did_you_mean, reason
from qplug.evaluation.recovery import Score

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

#: Repetitions of a bootstrap, for the few metrics whose standard error lm-eval finds with one.
_BOOTSTRAP = 1000

#: The seed of solved examples, and of numpy's and torch's generators, in ``lm_eval run``.
_SEED = 1234


def require_lm_eval() -> None:
    """Raises QplugError if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise QplugError("tasks need lm-eval: pip install 'qplug[eval]'")


@dataclass(frozen=True)
class Tasks:
    """Tasks that were asked for.

    ``names``: names of lm-eval's tasks, groups and tags, or paths of YAML files. ``folder``: where
    further tasks are defined. ``limit``: the most items of a task, None for all. ``shots``: solved
    examples before each item, None for the task's own number. ``chat``: whether prompts go through
    the chat template.
    """

    names: Sequence[str]
    folder: Path | None = None
    limit: int | None = None
    shots: int | None = None
    chat: bool = False

    def load(self) -> LoadedTasks:
        """Returns the tasks with their data, ready to be run once.

        Raises QplugError for a name that is no task, for a task whose data do not load, and for
        tasks that run code of the model or need pictures.
        """
        manager = self._manager()
        with quiet():
            try:
                loaded = manager.load(list(self.names))
            except Exception as error:  # a task may run any code, and data may come from anywhere
                raise QplugError(f"{', '.join(self.names)}: {reason(error)}") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise QplugError(f"task {name}: runs code that the model writes, qplug does not")
            if getattr(task, "MULTIMODAL", False):
                raise QplugError(f"task {name}: has pictures, and models read only text here")
        return LoadedTasks(self, loaded["tasks"], loaded["groups"])

    def _manager(self) -> TaskManager:
        """Returns lm-eval's manager with the tasks' index, after a look at every name."""
        from lm_eval.tasks import TaskManager

        for name in self.names:
            if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
                raise QplugError(f"{name}: no such file")
        if self.folder is not None and not self.folder.is_dir():
            raise QplugError(f"{self.folder}: no such folder")
        named = [name for name in self.names if not name.endswith((".yaml", ".yml"))]
        with quiet():
            own = TaskManager(include_path=self.folder, include_defaults=False)
            if all(name in own.task_index for name in named):
                return own  # lm-eval reads ten thousand files to list its own tasks
            manager = TaskManager(include_path=self.folder)
        for name in named:
            if name not in manager.task_index:
                hint = did_you_mean(name, manager.all_tasks)
                raise QplugError(f"no task is called {name!r}.{hint} lm-eval ls tasks lists them")
        return manager


@dataclass(frozen=True)
class LoadedTasks:
    """The tasks and groups that ``asked`` names, as lm-eval loads them, by name."""

    asked: Tasks
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]

    def run(self, model: LM) -> dict[tuple[str, str], TaskScore]:
        """Returns the scores of ``model``, by task and metric.

        A group that has a score of its own stands for its tasks.
        """
        from lm_eval.evaluator import evaluate

        for task in self.tasks.values():
            own = task.get_config("num_fewshot")
            if self.asked.shots is not None and own != 0:  # a task with 0 allows no examples
                task.set_config(key="num_fewshot", value=self.asked.shots)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        with quiet(), _seeded():
            results = evaluate(
                lm=model,
                task_dict={
                    "tasks": self.tasks,
                    "groups": self.groups,
                    "group_map": {name: group.child_names for name, group in self.groups.items()},
                },
                limit=self.asked.limit,
                apply_chat_template=self.asked.chat,
                fewshot_as_multiturn=True,
                bootstrap_iters=_BOOTSTRAP,
            )
        assert results is not None
        scored = [group for group in self.groups.values() if group.has_aggregation]
        hidden = {name for group in scored for name in _within(group)}
        found = (score for score in scores_of(results) if score.task not in hidden)
        return {(score.task, score.metric): score for score in found}


def _within(group: Any) -> Iterator[str]:
    """Yields the names of the tasks and groups inside ``group``."""
    yield from (task.task_name for task in group.get_all_tasks())
    yield from (inner.name for inner in group.get_all_groups() if inner is not group)


@dataclass(frozen=True)
class TaskScore:
    """The score of a model in ``task`` by ``metric``, whose name ends in its filter.

    ``higher_is_better`` is None if lm-eval does not say.
    """

    task: str
    metric: str
    score: Score
    count: int
    higher_is_better: bool | None


def scores_of(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Yields the scores in the results of lm-eval, those of groups after their tasks'."""
    for task, metrics in results["results"].items():
        leaves = _leaves(task, results)
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            items = tuple(_items(leaves, metric, kind, results))
            score = Score(float(value), _number(stderr), items)
            better = results.get("higher_is_better", {}).get(task, {}).get(metric)
            count = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
            shown = metric if kind == "none" else f"{metric} ({kind})"
            yield TaskScore(task, shown, score, count, better)


def _leaves(task: str, results: Mapping[str, Any]) -> list[str]:
    """Returns the tasks of a group, or of a task itself."""
    if task in results["configs"]:
        return [task]
    inner = results.get("group_subtasks", {}).get(task, [])
    return [leaf for name in inner for leaf in _leaves(name, results)]


def _items(
    leaves: Sequence[str], metric: str, kind: str, results: Mapping[str, Any]
) -> Iterator[float]:
    """Yields the score of each item; nothing if an item has none."""
    values = []
    for leaf in leaves:
        samples = [s for s in results.get("samples", {}).get(leaf, ()) if s["filter"] == kind]
        for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
            value = _number(sample.get(metric))
            if value is None:
                return
            values.append(value)
    yield from values


def _number(value: object) -> float | None:
    """Returns ``value`` as a number; lm-eval writes "N/A" where it knows none."""
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def _seeded() -> Iterator[None]:
    """Within the context all generators of random numbers start as in ``lm_eval run``.

    Two models are asked the same questions; afterwards the generators go on as before.
    """
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context lm-eval and datasets report errors alone, and draw no bars."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
