"""Writes the tables of docs/models.md: what the zoo's run found, and what engines build float.

The run is in docs/models.json, which ``python -m zoo`` in tests writes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qplug.model.kept_float import KEPT_FLOAT

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RESULTS = DOCS / "models.md", DOCS / "models.json"

Records = Mapping[str, Mapping[str, Any]]

#: What the page calls the outcome of a run.
_WORDS = {"ok": "yes", "refused": "no", "unsound": "no", "crash": "no", "timeout": "no"}
#: What it calls the engines that folders were loaded in.
_ENGINES = {
    "vllm-cpu": "vLLM, CPU",
    "vllm-gpu": "vLLM, GPU",
    "sglang-gpu": "SGLang, GPU",
}


def kept_float() -> str:
    """Returns the table of weights that engines build float, in Markdown."""
    lines = ["| weights | models | engines | why | read in |", "|---|---|---|---|---|"]
    for row in KEPT_FLOAT:
        cells = (
            ", ".join(f"`{pattern}`" for pattern in row.patterns),
            ", ".join(row.models) or "all",
            ", ".join(row.why.engines) or "all",
            row.why.reason,
            row.why.source.replace("*", r"\*"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def counts(records: Records) -> str:
    """Returns when the run was made, of what, and how many models came through each step."""
    versions = {
        f"{package} {version}"
        for found in records.values()
        for package, version in found.get("versions", {}).items()
    }
    dates = sorted({found["date"] for found in records.values() if "date" in found})
    runs, engines = _runs(records), _engines(records)
    lines = [
        f"{len(records)} models, run with {', '.join(sorted(versions))}"
        f" from {dates[0]} to {dates[-1]}:"
        if len(dates) > 1
        else f"{len(records)} models, run with {', '.join(sorted(versions))} on {''.join(dates)}:",
        "",
        "| step | models | came through |",
        "|---|---|---|",
    ]
    for run in runs:
        tried = [found[run]["outcome"] for found in records.values() if run in found]
        lines.append(f"| {run}, `verify` | {len(tried)} | {tried.count('ok')} |")
    for engine in engines:
        served = [found["served"][engine] for found in records.values() if _has(found, engine)]
        taken = [record for record in served if record["outcome"] != "not its model"]
        same = sum(record["outcome"] == "ok" for record in taken)
        version = next((record["version"] for record in served if record.get("version")), "")
        lines.append(f"| loaded by {_ENGINES[engine]} ({version}) | {len(taken)} | {same} |")
    return "\n".join(lines)


def outcomes(records: Records) -> str:
    """Returns a table for each family: what each step made of each model.

    A table has the steps that a model of the family went through.
    """
    reasons = _Notes()
    lines = []
    for family, models in _by_family(records).items():
        runs = [run for run in _runs(records) if run in _runs(models)]
        engines = [engine for engine in _engines(records) if engine in _engines(models)]
        heads = ["model", "class", *runs, *(f"loaded by {_ENGINES[name]}" for name in engines)]
        lines += [f"### {family[0].upper()}{family[1:]}", ""]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, found in models.items():
            cells = [name, f"`{found['architecture']}`"]
            cells += [_outcome(found.get(run), reasons) for run in runs]
            cells += [_served(found.get("served", {}).get(engine)) for engine in engines]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, *reasons.lines()]).rstrip()


def floats(records: Records) -> str:
    """Returns a table of what is quantized in each model, and what stays float and why."""
    reasons = _Notes()
    lines = ["| model | quantized | stays float |", "|---|---|---|"]
    for name, found in sorted(records.items()):
        stays = found.get("inspect", {}).get("stays float", {})
        by_reason: dict[str, list[str]] = defaultdict(list)
        for kind, why in stays.items():
            by_reason[why].append(kind)
        cells = [name, _kinds(found.get("quantized", []))]
        cells.append(
            "; ".join(f"{_kinds(kinds)} ({reasons.mark(why)})" for why, kinds in by_reason.items())
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *reasons.lines()]).rstrip()


class _Notes:
    """Numbers for sentences that several cells share."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, sentence: str) -> str:
        return str(self._numbers.setdefault(_general(sentence), len(self._numbers) + 1))

    def lines(self) -> list[str]:
        return [f"{number}. {text}" for text, number in self._numbers.items()]


def _general(sentence: str) -> str:
    """Returns the sentence without numbers of layers and without commands, safe for Markdown."""
    sentence = re.sub(r"\.\d+(?=\.)", ".*", sentence.partition("; to keep them float")[0])
    sentence = re.sub(r"Model type should be one of.*", "", sentence)
    return re.sub(r"([*_<>|])", r"\\\1", sentence).strip()


def _runs(records: Records) -> list[str]:
    names = dict.fromkeys(
        key
        for found in records.values()
        for key, value in found.items()
        if isinstance(value, dict) and "outcome" in value
    )
    return sorted(names, key=lambda name: (not name.startswith("rtn W4A16"), name))


def _engines(records: Records) -> list[str]:
    return [name for name in _ENGINES if any(_has(found, name) for found in records.values())]


def _has(found: Mapping[str, Any], engine: str) -> bool:
    return engine in found.get("served", {})


def _by_family(records: Records) -> dict[str, dict[str, Mapping[str, Any]]]:
    families: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for name, found in sorted(records.items()):
        families[found["family"]][name] = found
    return families


def _outcome(run: Mapping[str, Any] | None, reasons: _Notes) -> str:
    if run is None:
        return ""
    word = _WORDS[run["outcome"]]
    return word if word == "yes" else f"no ({reasons.mark(run['says'])})"


def _served(record: Mapping[str, Any] | None) -> str:
    """Returns what became of a folder in an engine."""
    if record is None:
        return ""
    yes = "yes, emulated" if "emulated" in record else "yes"
    words = {"ok": yes, "differs": f"differs by {record.get('difference')}", "not loaded": "no"}
    outcome: str = record["outcome"]
    return words.get(outcome, outcome)


def _kinds(names: Iterable[str]) -> str:
    """Returns names without the way to their blocks: ``self_attn.q_proj, mlp.up_proj``."""
    short = dict.fromkeys(re.sub(r"^.*?\.\*\.", "", name) for name in names)
    return ", ".join(f"`{name}`" for name in short)


def written(page: str) -> str:
    """Returns ``page`` with each table between its marks."""
    records: Records = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    tables: dict[str, Callable[[], str]] = {
        "table": kept_float,
        "counts": lambda: counts(records),
        "outcomes": lambda: outcomes(records),
        "floats": lambda: floats(records),
    }
    for name, table in tables.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, mark, rest = page.partition(begin)
        if mark:
            page = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
