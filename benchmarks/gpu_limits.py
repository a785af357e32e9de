"""What a GPU gives, and the seconds of each kernel in a calibrated run, the third of its process.

    python benchmarks/gpu_limits.py MODEL TEXT [--algo gptq] [--samples 128] [--seq-len 2048]

MODEL is the folder that ``calibrated_gpu.py TEXT --folder MODEL`` wrote. Operations and bytes are
counted from the shapes, by hand: what they come to a second is to be held against the first lines.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import qplug


def limits() -> None:
    """Print the rates of products and copies of large matrices."""
    for dtype in (torch.bfloat16, torch.float32):
        one, two = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        rate = 2 * 8192**3 / seconds(partial(torch.mm, one, two))
        print(f"{dtype}: {rate / 1e12:.0f} TFLOP/s")
    here = torch.empty(2**30, device="cuda")
    there = torch.empty_like(here)
    rate = 2 * here.nbytes / seconds(lambda: there.copy_(here))
    print(f"copies, read and written: {rate / 1e12:.2f} TB/s")
    locked = torch.empty(2**24, pin_memory=True)
    part = here[: 2**24]
    for name, work in (
        ("from", lambda: part.copy_(locked, non_blocking=True)),
        ("to", lambda: locked.copy_(part, non_blocking=True)),
    ):
        print(f"{name} locked memory: {locked.nbytes / seconds(work) / 1e9:.0f} GB/s")


def seconds(work: Callable[[], object], times: int = 10) -> float:
    """What ``work`` takes on the GPU, once it has been done before."""
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def kernels(run: Callable[[], object], most: int = 30) -> None:
    """Print the kernels of ``run`` that take longest, and for how long any but copies ran."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
    found = profiled.profiler.kineto_results.events()
    on_gpu = [event for event in found if str(event.device_type()).endswith("CUDA")]
    spent: Counter[str] = Counter()
    for event in on_gpu:
        spent[event.name()] += event.duration_ns()
    calls = Counter(event.name() for event in on_gpu)
    busy, until = 0, 0
    for begin, end in sorted(
        (event.start_ns(), event.end_ns()) for event in on_gpu if "emcpy" not in event.name()
    ):
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    print(f"busy for {busy / 1e9:.2f} s, copies aside")
    for name, nanoseconds in spent.most_common(most):
        print(f"{nanoseconds / 1e9:7.3f} s x{calls[name]:6d} {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--algo", default="gptq")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    args = parser.parse_args()
    limits()
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            qplug.quantize(
                args.model,
                Path(folder) / "out",
                algo=args.algo,
                backend="vllm",
                dataset="text",
                dataset_options={"path": str(args.text), "order": "sequential"},
                samples=args.samples,
                seq_len=args.seq_len,
                device="cuda",
                overwrite=True,
            )

        run()
        run()
        kernels(run)


if __name__ == "__main__":
    main()
