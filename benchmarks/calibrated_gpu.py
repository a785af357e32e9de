"""Time and GPU memory of calibrated runs on four decoder layers of Llama-3-8B's shape.

    python benchmarks/calibrated_gpu.py TEXT [--folder DIR]

TEXT is a file of calibration text with half a million tokens or more. Every command is a process of
its own, in which it runs twice: the first time also imports model code, starts the GPU's libraries
and compiles kernels. A clock starts with loading and stops when the quantized folder is written.
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
    ("awq", 128, 512, {"clip_in_search": 0}),
    ("gptq", 128, 2048, {}),
    ("gptq", 128, 2048, {"correct": 0.35}),
    ("gptq", 128, 2048, {"correct": 0.35, "true_sequential": True}),
)


def write_slice(folder: Path) -> None:
    """Random weights, four layers; norms with a few large channels. The tokenizer is the demo's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qplug.source import find_model

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
    import time

    import torch

    from qplug import quantize

    given = json.loads(case)
    torch.zeros(1, device="cuda").item()
    seconds, stages = [], {}
    for _ in range(2):
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
            algorithm_options={given["algo"]: given["options"]},
            device="cuda",
            overwrite=True,
        )
        seconds.append(time.monotonic() - began)
        stages = {stage.name: round(stage.seconds, 2) for stage in result.stages}
    print(json.dumps([*seconds, torch.cuda.max_memory_allocated() / 2**30, stages]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.one:
        one(told.one)
        return
    folder = told.folder or Path(tempfile.mkdtemp(prefix="qplug-slice-"))
    if not (folder / "config.json").exists():
        write_slice(folder)
    print("| command | first | second | GPU memory | seconds of the second by stage |")
    print("|---|---|---|---|---|")
    for algo, samples, seq_len, options in CASES:
        case = json.dumps(
            {
                "model": str(folder),
                "out": str(folder.with_name(folder.name + "-out")),
                "text": str(told.text),
                "algo": algo,
                "samples": samples,
                "seq_len": seq_len,
                "options": options,
            }
        )
        command = [sys.executable, __file__, str(told.text), "--one", case]
        printed = subprocess.run(command, check=True, capture_output=True).stdout
        first, second, memory, stages = json.loads(printed.splitlines()[-1])
        words = " ".join(f"-o {algo}.{name}={value}" for name, value in options.items())
        print(
            f"| {algo} {words} {samples} x {seq_len} | {first:.2f} s | {second:.2f} s "
            f"| {memory:.2f} GiB | {stages} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
