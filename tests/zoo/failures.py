"""The list of what does not work, grouped by cause."""

from __future__ import annotations

import re
from collections import defaultdict

from zoo.catalogue import CATALOGUE
from zoo.results import Results
from zoo.steps import RUNS


def counts(results: Results) -> str:
    """Returns a table in Markdown: how many models each run took, of those that were tried."""
    outcomes = ("ok", "refused", "unsound", "crash")
    lines = [f"| run | {' | '.join(outcomes)} | of |", "|---|---|---|---|---|---|"]
    for name in RUNS:
        ended = [found[name]["outcome"] for found in results.values() if name in found]
        cells = [str(ended.count(outcome)) for outcome in outcomes]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(ended)} |")
    return "\n".join(lines)


def failures(results: Results) -> str:
    """Returns the list in Markdown: each cause, how many models it has, and their names."""
    causes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    examples: dict[str, str] = {}
    for model, found in results.items():
        if model not in CATALOGUE:
            continue
        if "not made" in found:
            _add(causes, examples, "not made", found["not made"], model, "make")
        if "ended" in found:
            _add(causes, examples, "ended early", found["ended"], model, "all")
        for name in RUNS:
            if name in found and found[name]["outcome"] != "ok":
                _add(causes, examples, found[name]["outcome"], found[name]["says"], model, name)
    order = sorted(causes, key=lambda cause: -len(causes[cause]))
    lines = []
    for cause in order:
        lines += [f"### {len(causes[cause])} models: {cause.partition(': ')[0]}", ""]
        lines += [f"    {examples[cause]}", ""]
        for model, runs in sorted(causes[cause].items()):
            which = "all runs" if len(runs) == len(RUNS) else ", ".join(runs)
            lines.append(f"- {model} ({CATALOGUE[model].architecture}): {which}")
        lines.append("")
    return "\n".join(lines)


def _add(
    causes: dict[str, dict[str, list[str]]],
    examples: dict[str, str],
    outcome: str,
    says: str,
    model: str,
    run: str,
) -> None:
    cause = f"{outcome}: {_shape(says)}"
    examples.setdefault(cause, f"{model}: {says}")
    causes[cause][model].append(run)


def _shape(says: str) -> str:
    """Returns the sentence without the names and numbers in it."""
    without = re.sub(
        r"\(at .*\)$|'[^']*'|\b[\w*]+(\.[\w*]+)+\b|\b[A-Z]\w*[A-Z]\w*\b|\d+", "_", says
    )
    return re.sub(r"[_,\s\[\]()%.]+", " ", without)[:90]
