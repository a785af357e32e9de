"""What a scheme buys: tokens a second in vLLM, of random weights of the shape of Llama 3 8B.

    python benchmarks/serving.py RESULT.json [--python PYTHON] [--gpus 0,1] [--folder DIR]

Writes the float model, quantizes it with rtn on the GPUs, and has vLLM serve each folder, one on a
GPU at a time. ``--python`` is that of vLLM's environment (QPLUG_VLLM_PYTHON, or else this one), and
QPLUG_VLLM_PYTHONPATH packages beside it. ``DIR`` takes 40 GB, and is best in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from queue import Queue
from tempfile import mkdtemp
from typing import Any

from llama_shapes import LLAMA_3_8B

FLOAT, SCHEMES = "bf16", ("W4A16", "W8A8", "FP8_DYNAMIC")

#: For vllm.LLM, best first: its decoding in CUDA graphs, without minutes of compilation.
OPTIONS = [
    {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32],
        },
        "kernel_config": {"enable_flashinfer_autotune": False},
        "kv_cache_memory_bytes": 4 * 2**30,
        "gpu_memory_utilization": 0.5,
    },
    {"enforce_eager": True, "attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.5},
]


def write_model(folder: Path, layers: int) -> None:
    """Random weights, one file a layer; the tokenizer is the demo's."""
    from qplug.checkpoint.locate import find_model

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B.config(layers)))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / file, folder)
    with ThreadPoolExecutor(8) as writers:
        placed = dict(
            place
            for places in writers.map(lambda layer: _write(folder, layer), range(-1, layers))
            for place in places.items()
        )
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write(folder: Path, layer: int) -> dict[str, str]:
    """The file of a layer, or with -1 of all outside of them; which tensor is in which file."""
    import torch
    from safetensors.torch import save_file

    shapes = LLAMA_3_8B.outer() if layer < 0 else LLAMA_3_8B.layer(layer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(layer + 1)
    tensors = {}
    for name, shape in shapes.items():
        weight = torch.ones(shape, dtype=torch.bfloat16, device=device)
        if len(shape) == 2:
            weight.normal_(std=0.02, generator=generator)
        tensors[name] = weight.cpu()
    file = f"model-{layer + 1:02}.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file)


def run(words: list[str], gpu: str, log: Path, environment: dict[str, str] | None = None) -> int:
    given = {**(environment or os.environ), **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    with log.open("wb") as stream:
        return subprocess.run(
            words, env=given, stdout=stream, stderr=subprocess.STDOUT, check=False
        ).returncode


def measured(base: Path, name: str, gpu: str, told: argparse.Namespace) -> dict[str, Any]:
    """Quantize if need be, and time; what failed has its ``error``."""
    folder, log = base / name, base / f"{name}.log"
    result = base / f"{name}.json"
    if name != FLOAT and not folder.exists():
        words = [sys.executable, "-m", "qplug", "quantize", str(base / FLOAT), "--algo", "rtn"]
        words += ["--scheme", name, "--backend", "vllm", "--out", str(folder)]
        if run(words, gpu, log):
            return {"error": log.read_text("utf-8", errors="replace")[-800:]}
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    packages = os.environ.get("QPLUG_VLLM_PYTHONPATH")
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_DEEP_GEMM": "0",
        **inherited,
        **({"PYTHONPATH": packages} if packages else {}),
    }
    script = Path(__file__).with_name("serving_speed.py")
    words = [told.python, str(script), str(folder), str(result), told.options]
    if run(words, gpu, log, environment) or not result.exists():
        return {"error": log.read_text("utf-8", errors="replace")[-800:]}
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--python", default=os.environ.get("QPLUG_VLLM_PYTHON", sys.executable))
    parser.add_argument("--gpus", default="0", help="such as 0,1; empty for a CPU")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--options", default=json.dumps(OPTIONS), help="a JSON list, for vllm.LLM")
    told = parser.parse_args()
    base = told.folder or Path(mkdtemp(prefix="qplug-serving-"))
    began = time.monotonic()
    if not (base / FLOAT).exists():
        write_model(base / FLOAT, told.layers)
    print(f"the float model is written after {time.monotonic() - began:.0f} s", flush=True)
    # A GPU is free again when what ran on it is done.
    free: Queue[str] = Queue()
    for gpu in told.gpus.split(","):
        free.put(gpu)
    rows: dict[str, Any] = {}

    def one(name: str) -> None:
        gpu = free.get()
        rows[name] = measured(base, name, gpu, told)
        free.put(gpu)
        print(f"{time.monotonic() - began:.0f} s: {name}: {rows[name]}", flush=True)
        found = {"date": date.today().isoformat(), "layers": told.layers, "rows": rows}
        told.result.write_text(json.dumps(found, indent=1) + "\n", "utf-8")

    with ThreadPoolExecutor(max(1, free.qsize())) as runs:
        list(runs.map(one, (FLOAT, *SCHEMES)))


if __name__ == "__main__":
    main()
