"""Time and GPU memory of calibrated runs on four decoder layers of Llama-3-8B's shape.

    python benchmarks/calibrated_gpu.py TEXT [--folder DIR] [--runs N] [--processes N] [--algo ALGO]

TEXT is a file of calibration text with half a million tokens or more. Every command is a process of
its own, or as many as torchrun starts, in which it runs several times: the first time also imports
model code, starts the GPU's libraries and compiles kernels. A clock starts with loading and stops
when the quantized folder is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = (
    ("awq", 128, 512, {}),
    ("gptq", 128, 2048, {}),
    ("omniquant", 128, 2048, {"dtype": "bfloat16"}),
    ("quarot+rtn", 1, 128, {}),
)


def write_slice(folder: Path) -> None:
    """Random weights, four layers; norms with a few large channels. The tokenizer is the demo's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qplug.checkpoint.locate import find_model

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.02)
        elif "norm" in name:
            parameter.data.fill_(1)
            parameter.data[torch.randperm(len(parameter), device="cuda")[:16]] = 20
    model.save_pretrained(folder, max_shard_size="2GB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / file, folder)


def one(case: str) -> None:
    """A run in this process; what it took goes to stdout as JSON."""
    import os
    import time

    import torch

    from qplug import quantize

    given = json.loads(case)
    torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}").item()
    seconds, stages = [], {}
    for _ in range(given["runs"]):
        began = time.monotonic()
        result = quantize(
            given["model"],
            given["out"],
            algo=given["algo"],
            backend="vllm",
            dataset="text",
            dataset_options={"path": given["text"], "order": "sequential"},
            samples=given["samples"],
            seq_len=given["seq_len"],
            algorithm_options={given["algo"]: given["options"]} if given["options"] else {},
            device="cuda",
            overwrite=True,
        )
        seconds.append(time.monotonic() - began)
        stages = {stage.name: round(stage.seconds, 2) for stage in result.stages}
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps([seconds, torch.cuda.max_memory_allocated() / 2**30, stages]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--runs", type=int, default=2, help="of each command in its process")
    parser.add_argument("--processes", type=int, default=1, help="a GPU each")
    parser.add_argument("--algo", help="its commands alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.one:
        one(told.one)
        return
    folder = told.folder or Path(tempfile.mkdtemp(prefix="qplug-slice-"))
    if not (folder / "config.json").exists():
        write_slice(folder)
    launch = ["-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
    launch += ["--nproc-per-node", str(told.processes)]
    print("| command | seconds of each run | GPU memory | seconds of the last by stage |")
    print("|---|---|---|---|")
    for algo, samples, seq_len, options in CASES:
        if told.algo not in (None, algo):
            continue
        case = json.dumps(
            {
                "model": str(folder),
                "out": str(folder.with_name(folder.name + "-out")),
                "text": str(told.text),
                "algo": algo,
                "samples": samples,
                "seq_len": seq_len,
                "options": options,
                "runs": told.runs,
            }
        )
        words = [__file__, str(told.text), "--one", case]
        command = [sys.executable, *(launch if told.processes > 1 else []), *words]
        printed = subprocess.run(command, check=True, capture_output=True).stdout
        seconds, memory, stages = json.loads(printed.splitlines()[-1])
        given = " ".join(f"-o {algo}.{name}={value}" for name, value in options.items())
        print(
            f"| {algo} {given} {samples} x {seq_len} | {', '.join(f'{s:.2f}' for s in seconds)} "
            f"| {memory:.2f} GiB | {stages} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
