"""Loads quantized tiny models in a real engine, and compares its answers with qplug's reader."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_processes import EnginePool
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
#: A float model that is so far away is another one to the engine.
OTHER_MODEL = 0.1


def serve(names: Sequence[str], file: Path, *, engine: str, run: str, jobs: int) -> None:
    """Loads each model, quantized by ``run``, in ``engine``, and adds what it answers to ``file``.

    Each is added when it is done. In the record of a model, ``served`` has by engine: ``version``,
    ``device``, ``run``, what was ``emulated``, and either ``difference`` (nats, the mean over
    tokens) or ``error``. Where that is an error or large, the float model is loaded too, and
    ``float difference`` or ``float error`` says what it gave.
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
        quantized = _quantized(names, Path(base), prompts, run, jobs)
        with ENGINES[engine].started(prompts.tolist(), Path(base)) as running:
            for name, read in quantized:
                record = _loaded(Path(base) / name, read, ENGINES[engine], running) | {"run": run}
                results = read_results(file)
                results.setdefault(name, {}).setdefault("served", {})[engine] = record
                write_results(file, results)
                print(f"{name}: {record}", flush=True)
                shutil.rmtree(Path(base) / name)


@dataclass(frozen=True)
class Reading:
    """What a model computes of ``WINDOWS`` windows of ``LENGTH`` tokens.

    ``kind``: ``logprobs`` for a model of text, with ``values: [windows, tokens - 1]`` of the tokens
    that are there; ``embeddings`` with ``[windows, tokens, hidden]``; or ``scores`` of a model that
    ranks, with ``[windows, labels]``.
    """

    kind: str
    values: Tensor

    def difference(self, answered: Tensor) -> float:
        """How far an engine's answers are, on average: in nats, or as a share of embeddings."""
        away = (answered - self.values).float()
        if self.kind == "embeddings":
            return (away.norm(dim=-1) / self.values.norm(dim=-1)).mean().item()
        return away.abs().mean().item()


#: The task of vLLM's pooling models by what a model computes; None is text.
_TASKS = {"logprobs": None, "embeddings": "token_embed", "scores": "classify"}


def _quantized(
    names: Sequence[str], base: Path, prompts: Tensor, run: str, jobs: int
) -> Iterator[tuple[str, dict[str, Reading]]]:
    """Yields each model that ``run`` takes, and what the reader finds in its folders.

    These are ``float`` and ``quantized``, in the folder of its name in ``base``.
    """

    def work(name: str, _: Path, tell: Callable[[str, Any], None]) -> None:
        model = make(name, base / name / "float")
        folder = base / name / "quantized"
        qplug.quantize(str(model), folder, samples=SAMPLES, seq_len=TOKENS, **RUNS[run])
        for kind, place in (("float", model), ("quantized", folder)):
            read = _read(place, prompts)
            tell(kind, (read.kind, read.values.tolist()))

    for name, record in in_forks(names, work, jobs=jobs, seconds=240):
        if "quantized" in record:
            told = {kind: record[kind] for kind in ("float", "quantized")}
            yield name, {key: Reading(kind, torch.tensor(of)) for key, (kind, of) in told.items()}
        else:
            print(f"{name}: not written: {record.get('not made', record.get('ended'))}", flush=True)


@torch.inference_mode()
def _read(folder: Path, prompts: Tensor) -> Reading:
    """Returns what qplug's reader computes from ``folder``."""
    model = qplug.load(str(folder))
    # One window at a time: a model that ranks reads the last token, whose place it asks in a batch.
    computed = [model(window[None], use_cache=False) for window in prompts]
    if "logits" not in computed[0]:
        return Reading("embeddings", torch.cat([of.last_hidden_state.float() for of in computed]))
    logits = torch.cat([of.logits.float() for of in computed])
    if logits.ndim == 2:
        return Reading("scores", logits)
    logprobs = logits.log_softmax(-1)[:, :-1]
    return Reading("logprobs", logprobs.gather(2, prompts[:, 1:, None]).squeeze(2))


def _loaded(
    folder: Path, read: Mapping[str, Reading], engine: RealEngine, running: EnginePool
) -> dict[str, Any]:
    """Returns the record of the model in ``folder``; ``read`` is what qplug's reader finds."""
    task = _TASKS[read["float"].kind]
    if task is not None and engine.name != "vllm":
        return {
            "error": "no other engine than vLLM is asked for embeddings",
            "outcome": "not asked",
        }
    pooling = {} if task is None else {"pooling": task}
    options = engine.options_for(folder / "quantized") | pooling
    asked = _asked(folder / "quantized", engine, options)
    answer = running.answer(f"{folder.name} quantized", asked)
    record = _compared(answer, read["quantized"])
    if answer.get("emulated"):
        record["emulated"] = answer["emulated"]
    if verdict(record) != "ok":
        asked = _asked(folder / "float", engine, pooling)
        answer = running.answer(f"{folder.name} float", asked)
        record |= {f"float {key}": value for key, value in _compared(answer, read["float"]).items()}
    version = running.told.get("versions", {}).get(engine.name)
    return record | {
        "outcome": verdict(record),
        "device": running.told.get("device"),
        "version": version,
    }


def _asked(folder: Path, engine: RealEngine, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the load of ``folder``: of its text part alone, if it has another."""
    config = read_json(folder / "config.json")
    has_tower = any(isinstance(config.get(part), dict) for part in _TOWERS)
    alone = {"language_model_only": True} if has_tower and engine.name == "vllm" else {}
    return {"folder": str(folder), "dtype": "auto", "options": {**options, **alone}}


def _compared(answer: Mapping[str, Any], read: Reading) -> dict[str, Any]:
    """Returns how far the engine's answer is from the reader's, or why there is none."""
    if "error" in answer:
        return {"error": _told(answer["error"])}
    answered = torch.tensor(answer["logprobs" if read.kind == "logprobs" else "pooled"])
    if answered.shape != read.values.shape:
        shapes = f"{[*answered.shape]}, not {[*read.values.shape]}"
        return {"error": f"its answers have another shape than the reader's: {shapes}"}
    if not (answered.isfinite().all() and read.values.isfinite().all()):
        return {"error": "its answers, or the reader's, are not finite"}
    return {"difference": round(read.difference(answered), 4)}


def _told(error: str) -> str:
    """Returns what an engine says went wrong, with its beginning and its end if it is long."""
    line = " ".join(error.split())
    return line if len(line) <= 300 else f"{line[:180]} ... {line[-115:]}"


def verdict(record: Mapping[str, Any]) -> str:
    """Returns ``ok``, ``differs``, ``not loaded``, or ``not its model``.

    The last: the engine does not load the float model either, or answers otherwise for it.
    """
    if "float error" in record or not record.get("float difference", 0.0) < OTHER_MODEL:
        return "not its model"
    if "error" in record:
        return "not loaded"
    limit = max(LIMIT, TIMES_FLOAT * record.get("float difference", 0.0))
    return "ok" if record["difference"] < limit else "differs"
