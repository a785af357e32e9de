"""What a scheme buys: tokens a second in vLLM, of random weights of two published shapes.

    python benchmarks/serving.py RESULT.json [--rows 8b/bf16 ...] [--gpus 0,1] [--python PYTHON]

Writes the float models, quantizes them with rtn on the GPUs, and has vLLM serve each folder, one on
a GPU at a time, the rows of most use first. A row is printed as a line of JSON and merged into
RESULT.json as soon as it is measured; ``--rest`` leaves out the rows that the file has.
``--python`` is the interpreter of vLLM's environment (QPLUG_VLLM_PYTHON, or else this one), and
QPLUG_VLLM_PYTHONPATH names packages beside it. ``--folder`` takes 35 GB and 10 for each GPU, and is
best in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from queue import Queue
from tempfile import mkdtemp
from threading import Lock
from typing import Any, Protocol

from llama_shapes import LLAMA_3_8B, Shapes
from qwen3_moe_shapes import QWEN3_30B_A3B

FLOAT = "bf16"

#: The schemes of a shape, those of most use first.
SCHEMES = ("W4A16", "FP8_DYNAMIC", "W8A8", "NVFP4A16", "FP8_BLOCK", "W4AFP8")

#: For vllm.LLM: its decoding in CUDA graphs, without minutes of compilation.
OPTIONS = {
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 32, 256],
    },
    "kernel_config": {"enable_flashinfer_autotune": False},
    "kv_cache_memory_bytes": 8 * 2**30,
    "gpu_memory_utilization": 0.5,
}

#: What vLLM must not compile when it starts: that takes minutes.
SWITCHES = {
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}

#: Lines in which vLLM names the kernels that it has chosen.
KERNELS = re.compile(r"(?:Using|Selected) (\w*Kernel\w*|[\w' ]*?\bMoE backend|\w+MoEMethod)")

#: A row is not begun when fewer seconds are left.
LEAST_SECONDS = 40


class Shape(Protocol):
    """The shapes of a model's tensors, and its config.json."""

    def layer(self, number: int) -> Shapes: ...
    def outer(self) -> Shapes: ...
    def config(self, layers: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Model:
    """A published shape, and of how many layers the model is that is timed."""

    title: str
    shape: Shape
    layers: int


#: By the name in a row's.
MODELS = {
    "8b": Model("Llama 3 8B", LLAMA_3_8B, 32),
    "experts": Model("Qwen3 30B A3B", QWEN3_30B_A3B, 12),
}


def write_model(folder: Path, model: Model) -> None:
    """Random weights, one file a layer; the tokenizer is the demo's."""
    from qplug.checkpoint.locate import find_model

    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "config.json").write_text(json.dumps(model.shape.config(model.layers)))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / file, partial)
    with ThreadPoolExecutor(8) as writers:
        written = writers.map(
            lambda layer: _write(partial, model.shape, layer), range(-1, model.layers)
        )
        placed = dict(place for places in written for place in places.items())
    index = {"metadata": {}, "weight_map": placed}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    partial.rename(folder)


def _write(folder: Path, shape: Shape, layer: int) -> dict[str, str]:
    """The file of a layer, or with -1 of all outside of them; which tensor is in which file."""
    import torch
    from safetensors.torch import save_file

    shapes = shape.outer() if layer < 0 else shape.layer(layer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(layer + 1)
    tensors = {}
    for name, sides in shapes.items():
        weight = torch.ones(sides, dtype=torch.bfloat16, device=device)
        if len(sides) == 2:
            weight.normal_(std=0.02, generator=generator)
        tensors[name] = weight.cpu()
    file = f"model-{layer + 1:02}.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file)


def run(
    words: Sequence[str], gpu: str, log: Path, limit: float, environment: dict[str, str]
) -> str | None:
    """Runs a program with its children for at most ``limit`` seconds; what went wrong, or None."""
    given = {**environment, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            words, env=given, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit:.0f} s: {_end(log)}"
    return f"exit {code}: {_end(log)}" if code else None


def _end(log: Path) -> str:
    """The last lines of a log that name an error, or else its end."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    errors = re.compile(r"\b\w*(Error|Exception)\b: ")
    named = [line for line in lines if errors.search(line) and "WARNING" not in line]
    return " | ".join(line[-300:] for line in (named or lines)[-2:])


@dataclass
class Benchmark:
    """The rows that are to be measured, and where."""

    told: argparse.Namespace
    base: Path
    names: list[str]
    began: float = field(default_factory=time.monotonic)
    lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        # A GPU is free again when what ran on it is done.
        self.free: Queue[str] = Queue()
        for gpu in self.told.gpus.split(","):
            self.free.put(gpu)
        self.unfinished = Counter(name.partition("/")[0] for name in self.names)

    def left(self) -> float:
        """The seconds that are left for a row."""
        left: float = self.told.seconds - (time.monotonic() - self.began)
        return left

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:.0f} s] {text}", flush=True)

    def __call__(self) -> None:
        keys = list(self.unfinished)
        with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(self.free.qsize()) as runs:
            written = {key: writer.submit(self.write, key) for key in keys}
            list(runs.map(lambda name: self.row(name, written), self.names))

    def write(self, key: str) -> None:
        """The float model of a shape."""
        folder = self.base / key / FLOAT
        if not folder.exists():
            model = MODELS[key]
            layers = self.told.layers or model.layers
            write_model(folder, Model(model.title, model.shape, layers))
        self.say(f"the float model {key} is written")

    def row(self, name: str, written: dict[str, Future[None]]) -> None:
        """Measures a row, prints it and keeps it; a row that fails has its ``error``."""
        key, _, scheme = name.partition("/")
        written[key].result()
        gpu = self.free.get()
        try:
            if self.left() < LEAST_SECONDS:
                self.say(f"{name} is left out: {self.left():.0f} s are left")
                return
            model = MODELS[key]
            found = {
                "shape": model.title,
                "layers": self.told.layers or model.layers,
                "scheme": scheme,
                "date": date.today().isoformat(),
                **self.measured(key, scheme, gpu),
            }
            self.say(json.dumps(found, separators=(",", ":")))
            with self.lock:
                keep(self.told.result, found)
        finally:
            self.free.put(gpu)
            folder = self.base / key
            with self.lock:
                self.unfinished[key] -= 1
                if scheme != FLOAT:
                    shutil.rmtree(folder / scheme, ignore_errors=True)
                if not self.unfinished[key]:
                    shutil.rmtree(folder / FLOAT, ignore_errors=True)

    def measured(self, key: str, scheme: str, gpu: str) -> dict[str, Any]:
        """Quantizes if need be, and times."""
        folder = self.base / key / scheme
        log, result = self.logs / f"{key}-{scheme}.log", self.base / f"{key}-{scheme}.json"
        began = time.monotonic()
        if scheme != FLOAT:
            words = [sys.executable, "-m", "qplug", "quantize", str(self.base / key / FLOAT)]
            words += ["--algo", "rtn", "--scheme", scheme, "--backend", "vllm", "--no-check"]
            words += ["--out", str(folder), "--overwrite"]
            if self.told.engine:
                words += ["--backend-opt", f"engine={self.told.engine}"]
            limit = min(self.left(), self.told.row_seconds)
            if wrong := run(words, gpu, log, limit, dict(os.environ)):
                return {"error": f"quantize: {wrong}"}
        quantizing = round(time.monotonic() - began, 1)
        packages = os.environ.get("QPLUG_VLLM_PYTHONPATH")
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **SWITCHES,
            **inherited,
            **({"PYTHONPATH": packages} if packages else {}),
        }
        script = Path(__file__).with_name("serving_speed.py")
        words = [self.told.python, str(script), str(folder), str(result), self.told.options]
        words += ["--requests", self.told.requests, "--prompt", str(self.told.prompt)]
        limit = min(self.left(), self.told.row_seconds)
        if wrong := run(words, gpu, log, limit, environment):
            return {"error": f"vLLM: {wrong}"}
        chosen = sorted(set(KERNELS.findall(log.read_text("utf-8", errors="replace"))))
        found: dict[str, Any] = json.loads(result.read_text("utf-8"))
        return {**found, "kernels": chosen, "seconds to quantize": quantizing}

    @property
    def logs(self) -> Path:
        folder: Path = self.told.result.parent / "logs"
        folder.mkdir(exist_ok=True, parents=True)
        return folder


def keep(file: Path, row: dict[str, Any]) -> None:
    """Writes ``row`` into ``file``, in the place of the same device's and of one that failed."""
    rows = [other for other in kept(file) if not _replaces(row, other)]
    lines = ",\n".join(f"  {json.dumps(each)}" for each in [*rows, row])
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(f'{{\n "rows": [\n{lines}\n ]\n}}\n', "utf-8")
    partial.replace(file)


def _replaces(row: dict[str, Any], other: dict[str, Any]) -> bool:
    if (row["shape"], row["scheme"]) != (other["shape"], other["scheme"]):
        return False
    return "error" in other or row.get("device") == other["device"]


def kept(file: Path) -> list[dict[str, Any]]:
    """The rows of ``file``, none if it is not there."""
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["rows"]
    return rows


def main() -> None:
    every = [f"{key}/{scheme}" for key in MODELS for scheme in (FLOAT, *SCHEMES)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", nargs="+", default=every, metavar="SHAPE/SCHEME", choices=every)
    parser.add_argument("--rest", action="store_true", help="leave out the rows of RESULT.json")
    parser.add_argument("--python", default=os.environ.get("QPLUG_VLLM_PYTHON", sys.executable))
    parser.add_argument("--gpus", default="0", help="such as 0,1; empty for a CPU")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, help="of each model; default: 32 and 12")
    parser.add_argument("--options", default=json.dumps(OPTIONS), help="JSON, for vllm.LLM")
    parser.add_argument("--requests", default="1,32,256")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of prompts that are read")
    parser.add_argument("--engine", help="the version of vLLM's tables, by default the newest")
    parser.add_argument("--seconds", type=float, default=1e6, help="for all rows together")
    parser.add_argument("--row-seconds", type=float, default=150, help="for a program of a row")
    told = parser.parse_args()
    done = {(row["shape"], row["scheme"]) for row in kept(told.result) if "error" not in row}
    names = [
        name
        for name in told.rows
        if not told.rest
        or (MODELS[name.partition("/")[0]].title, name.partition("/")[2]) not in done
    ]
    base = told.folder or Path(mkdtemp(prefix="qplug-serving-"))
    Benchmark(told, base, names)()


if __name__ == "__main__":
    main()
