"""Takes tiny models through qplug."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zoo.catalogue import CATALOGUE, family_of
from zoo.make import make
from zoo.pool import in_forks
from zoo.results import read_results, write_results
from zoo.steps import OWN_RUNS, RUNS, tried

#: What most models import: forks have it at once.
_PRELOADED = (
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.auto.modeling_auto",
    "qplug.run.quantize",
    "qplug.reading.verify",
    "qplug.cli.inspect",
)


def run(
    names: Sequence[str], file: Path, *, runs: Sequence[str], jobs: int, seconds: float
) -> None:
    """Tries the models, and adds each to the results in ``file`` when it is done."""
    preload()
    wanted = {name: RUNS[name] for name in runs}

    def work(name: str, folder: Path, tell: Callable[[str, Any], None]) -> None:
        model = make(name, folder / name)
        for key, value in tried(model, {**wanted, **OWN_RUNS.get(name, {})}):
            tell(key, value)

    for name, record in in_forks(names, work, jobs=jobs, seconds=seconds):
        results = read_results(file)
        ends = ("ended", "not made")  # of the run before
        kept = {key: value for key, value in results.get(name, {}).items() if key not in ends}
        fresh = {
            "architecture": CATALOGUE[name].architecture,
            "family": family_of(name),
            "date": datetime.date.today().isoformat(),
            "versions": {package: version(package) for package in ("qplug", "transformers")},
        }
        results[name] = {**kept, **fresh, **record}
        write_results(file, results)
        print(f"{name}: {summary(record)}", flush=True)


def preload() -> None:
    """Imports what most models need, so that forks need not."""
    for module in _PRELOADED:
        importlib.import_module(module)


def summary(record: dict[str, Any]) -> str:
    """Returns one line: how the runs ended."""
    if "not made" in record:
        return f"not made: {record['not made']}"
    ended = [f"{name}: {record[name]['outcome']}" for name in RUNS if name in record]
    return "; ".join([*ended, *([record["ended"]] if "ended" in record else [])])
