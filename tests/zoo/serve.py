"""Loads quantized tiny models in a real engine, and compares its answers with qplug's reader."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_engines import SGLANG_ON_GPU, VLLM_ON_CPU, VLLM_ON_GPU, RealEngine
from torch import Tensor

import qplug
from qplug.checkpoint.locate import DEMO
from qplug.checkpoint.open import read_json
from qplug.machine.session import Session
from qplug.reading.perplexity import evaluation_tokens
from zoo.make import make
from zoo.pool import in_forks
from zoo.results import read_results, write_results
from zoo.run import preload
from zoo.steps import RUNS, SAMPLES, TOKENS

ENGINES: dict[str, RealEngine] = {
    "vllm-cpu": VLLM_ON_CPU,
    "vllm-gpu": VLLM_ON_GPU,
    "sglang-gpu": SGLANG_ON_GPU,
}
#: The text that both read: so many windows of so many tokens.
WINDOWS, LENGTH = 4, 64
#: Parts of a configuration that are towers; their processors are not in the folder.
_TOWERS = ("vision_config", "audio_config")
#: The mean |difference| of log-probabilities that is allowed, and how many times the difference
#: that the float model has in the same engine.
LIMIT, TIMES_FLOAT = 0.05, 3.0


@dataclass(frozen=True)
class _Loads:
    """The folders of a tiny model, and what the reader finds in them."""

    folders: Mapping[str, Path]
    logprobs: Mapping[str, Tensor]


def serve(names: Sequence[str], file: Path, *, engine: str, run: str, jobs: int) -> None:
    """Loads each model, quantized by ``run``, in ``engine``, and adds what it answers to ``file``.

    In the record of a model, ``served`` has by engine: ``version``, ``device``, ``run``, and either
    ``difference`` (nats, the mean over tokens) or ``error``. Where that is an error or large, the
    float model is loaded too, and ``float difference`` or ``float error`` says what it gave.
    """
    preload()
    prompts = evaluation_tokens(
        DEMO,
        Session.alone(),
        dataset="demo",
        dataset_options=None,
        seq_len=LENGTH,
        windows=WINDOWS,
    )
    with tempfile.TemporaryDirectory() as base:
        made = _written(names, Path(base), prompts, run, jobs)
        _load(made, file, prompts, Path(base), ENGINES[engine], engine, run)


def _written(
    names: Sequence[str], base: Path, prompts: Tensor, run: str, jobs: int
) -> dict[str, _Loads]:
    """Returns the folders of the models that ``run`` takes, by name."""

    def work(name: str, _: Path, tell: Callable[[str, Any], None]) -> None:
        model = make(name, base / name / "float")
        folder = base / name / "quantized"
        qplug.quantize(str(model), folder, samples=SAMPLES, seq_len=TOKENS, **RUNS[run])
        tell("float", _read(model, prompts).tolist())
        tell("quantized", _read(folder, prompts).tolist())

    found = {}
    for name, record in in_forks(names, work, jobs=jobs, seconds=240):
        if "quantized" not in record:
            print(f"{name}: not written: {record.get('not made', record.get('ended'))}", flush=True)
            continue
        kinds = ("quantized", "float")
        found[name] = _Loads(
            {kind: base / name / kind for kind in kinds},
            {kind: torch.tensor(record[kind]) for kind in kinds},
        )
    return found


@torch.inference_mode()
def _read(folder: Path, prompts: Tensor) -> Tensor:
    """Returns the log-probabilities ``[windows, tokens - 1]`` that qplug's reader computes."""
    model = qplug.load(str(folder))
    logprobs = model(prompts, use_cache=False).logits.float().log_softmax(-1)
    return logprobs[:, :-1].gather(2, prompts[:, 1:, None]).squeeze(2)


def _load(
    made: Mapping[str, _Loads],
    file: Path,
    prompts: Tensor,
    base: Path,
    engine: RealEngine,
    called: str,
    run: str,
) -> None:
    found: dict[str, dict[str, Any]] = {name: {"run": run} for name in made}
    with engine.started(prompts.tolist(), base) as running:
        for name, loads in made.items():
            options = engine.options_for(loads.folders["quantized"])
            running.give(f"{name} quantized", _asked(loads.folders["quantized"], engine, options))
        _compare(found, made, "quantized", running.answers())
        doubted = [name for name, record in found.items() if verdict(record) != "ok"]
        for name in doubted:
            running.give(f"{name} float", _asked(made[name].folders["float"], engine, {}))
        _compare({name: found[name] for name in doubted}, made, "float", running.answers())
        told = running.told
    results = read_results(file)
    for name, record in found.items():
        record |= {"outcome": verdict(record), "device": told.get("device")}
        record |= {"version": told.get("versions", {}).get(engine.name)}
        results.setdefault(name, {}).setdefault("served", {})[called] = record
        print(f"{name}: {verdict(record)} {record}", flush=True)
    write_results(file, results)


def _asked(folder: Path, engine: RealEngine, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the load of ``folder``: of its text part alone, if it has another."""
    config = read_json(folder / "config.json")
    has_tower = any(isinstance(config.get(part), dict) for part in _TOWERS)
    alone = {"language_model_only": True} if has_tower and engine.name == "vllm" else {}
    return {"folder": str(folder), "dtype": "auto", "options": {**options, **alone}}


def _compare(
    found: Mapping[str, dict[str, Any]],
    made: Mapping[str, _Loads],
    kind: str,
    answers: Mapping[str, Mapping[str, Any]],
) -> None:
    """Adds to each record how far the engine's answers for ``kind`` are from the reader's."""
    prefix = "float " if kind == "float" else ""
    for name, record in found.items():
        answer = answers[f"{name} {kind}"]
        if "error" in answer:
            record[f"{prefix}error"] = answer["error"][-300:]
        else:
            away = torch.tensor(answer["logprobs"]) - made[name].logprobs[kind]
            record[f"{prefix}difference"] = round(away.abs().mean().item(), 4)


def verdict(record: Mapping[str, Any]) -> str:
    """Returns ``ok``, ``differs``, ``not loaded``, or ``not its model``.

    The last: the engine does not load the float model either.
    """
    if "float error" in record:
        return "not its model"
    if "error" in record:
        return "not loaded"
    limit = max(LIMIT, TIMES_FLOAT * record.get("float difference", 0.0))
    return "ok" if record["difference"] < limit else "differs"
