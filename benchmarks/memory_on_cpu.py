"""Measures the memory and the time that a run takes on a CPU for a checkpoint of a Llama's shape.

Writes a random slice of few layers, quantizes the slice by the command line, and prints the peak of
the process, imports included. A slice of one layer more shows the time of each layer of the whole
model. Exits with status 1 if the peak is above the target of the shape.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from llama_shapes import LLAMA_2_7B, LLAMA_2_70B, Llama
from safetensors.torch import save_file


@dataclass(frozen=True)
class Target:
    """A model of ``layers``, and the memory in bytes that a run may take."""

    shape: Llama
    layers: int
    peak: int


TARGETS = {
    "llama-2-7b": Target(LLAMA_2_7B, 32, 6 * 2**30),
    "llama-2-70b": Target(LLAMA_2_70B, 80, 8 * 2**30),
}


@dataclass(frozen=True)
class Used:
    """What a process took: CPU seconds (user and system), and bytes resident at most."""

    seconds: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=TARGETS, default="llama-2-7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], help="slices to run")
    parser.add_argument("--algo", default="gptq")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--memory", help="what a block may take, such as 6GiB")
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    args = parser.parse_args()

    target = TARGETS[args.shape]
    taken: dict[int, Used] = {}
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            model = Path(folder, "model")
            write_slice(model, target.shape, layers)
            words = ["quantize", str(model), "--out", str(Path(folder, "out"))]
            words += ["--algo", args.algo, "--device", "cpu", "--samples", str(args.samples)]
            words += ["--seq-len", str(args.seq_len), "--no-check"]
            words += ["--memory", args.memory] if args.memory else []
            used = taken[layers] = run(words)
        print(f"{layers} layers: {used.seconds:.0f} CPU s, peak {used.peak / 2**30:.2f} GiB")
    few, many = min(taken), max(taken)
    if many > few:
        each = (taken[many].seconds - taken[few].seconds) / (many - few)
        whole = taken[few].seconds + each * (target.layers - few)
        layers = f"{target.layers} layers: about {whole / 3600:.1f} CPU hours"
        print(f"a layer more: {each:.0f} CPU s; {layers}")
    peak = max(used.peak for used in taken.values())
    sys.exit(f"the peak is above {target.peak / 2**30:.0f} GiB" if peak > target.peak else None)


def write_slice(folder: Path, llama: Llama, layers: int) -> None:
    """A random checkpoint with the tokenizer of the demo model, one shard for each layer."""
    from qplug.checkpoint.locate import DEMO, find_model

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama.config(layers)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((find_model(DEMO) / name).read_bytes())
    generator = torch.Generator().manual_seed(0)
    shards = [llama.outer(), *(llama.layer(number) for number in range(layers))]
    places = {}
    for number, sides_by_name in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, sides in sides_by_name.items():
            noise = torch.ones(sides)
            if len(sides) == 2:
                noise.normal_(std=0.02, generator=generator)
            tensors[name] = noise.bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(words: list[str]) -> Used:
    """``qplug`` with ``words`` in a process of its own; exits if it fails."""
    # Not forked from this process, whose memory it would be said to have had: spawned.
    arguments = [sys.executable, "-c", _CHILD, *words]
    told = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak = json.loads(told.splitlines()[-1])
    return Used(seconds, peak)


#: Starts qplug from a process that has held nothing, since a child's peak begins with its parent's.
_CHILD = """
import json, os, sys
child = os.posix_spawn(sys.executable, [sys.executable, "-m", "qplug", *sys.argv[1:]], os.environ)
_, status, used = os.wait4(child, 0)
if status:
    sys.exit(os.waitstatus_to_exitcode(status))
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""


if __name__ == "__main__":
    main()
