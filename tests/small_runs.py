"""A run of a writer without a model: tensors in three shards, learned ones, a tokenizer."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qplug.api import Checkpoint, TensorSpec
from qplug.checkpoint.tensor_file import read_header
from qplug.output.checksums import file_checksum, header_checksum, record_checksum
from qplug.output.plan import Plan, Step
from qplug.output.source_bytes import SourceBytes
from qplug.output.step_report import Report
from qplug.output.writer import Writer
from qplug.recipe.recipe import Recipe

STEPS = 6
SHARDS = tuple(f"model-{n // 2 + 1:05d}-of-00003.safetensors" for n in range(STEPS))


def make_source(folder: Path) -> None:
    """Writes the float model."""
    folder.mkdir()
    tensors = {f"t{n}": torch.arange(400 + n, dtype=torch.float32) + n for n in range(STEPS)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}" * 300)


def plan() -> Plan:
    """One tensor in each step, two steps in each shard."""
    steps = [
        Step(f"t{n}", {}, (f"t{n}",), {f"t{n}": TensorSpec("float32", (400 + n,))})
        for n in range(STEPS)
    ]
    return Plan(tuple(steps), SHARDS)


def run(root: Path, *, overwrite: bool = False, factor: float = 2.0, learns: bool = True) -> int:
    """Doubles each tensor of ``root / "source"`` into ``root / "out"``; returns resumed steps."""
    tensors = read_header(root / "source" / "model.safetensors")
    source = Checkpoint(root / "source", {}, dict(tensors))
    learned = ("turn",) if learns else ()
    with Writer(
        root / "out",
        plan(),
        {"factor": factor},
        SourceBytes(plan(), source),
        overwrite=overwrite,
        companions=[root / "source" / "tokenizer.json"],
        learned=learned,
    ) as writer:
        for name in learned:
            assert writer.cached(name, lambda: {"turn": torch.tensor([factor])})["turn"] == factor
        done = dict(writer.finished)
        for number in range(STEPS):
            if number not in done:
                value = tensors[f"t{number}"].read() * factor
                writer.write(number, {f"t{number}": value}, Report(notes=(f"{number}",)).to_dict())
        writer.finish({"config.json": "{}\n", "README.md": "# x\n"}, record(factor))
    return len(done)


def record(factor: float) -> dict[str, Any]:
    """A qplug.json that ``read_manifest`` reads."""
    return {
        "version": 1,
        "model": "source",
        "recipe": Recipe().to_dict(),
        "versions": {},
        "schemes": [],
        "layers": {},
        "rewritten": [],
        "online": [],
        "notes": [f"times {factor}"],
    }


def is_sound(folder: Path) -> bool:
    """Whether all checksums in qplug.json are right, and nothing is missing or too much."""
    try:
        found = json.loads((folder / "qplug.json").read_text())
        if record_checksum(found) != found["checksum"]:
            return False
        sums = found["checksums"]
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        if names != {"qplug.json", *sums["files"], *sums["headers"]}:
            return False
        files = {name: file_checksum(folder / name) for name in sums["files"]}
        headers = {name: header_checksum(folder / name) for name in sums["headers"]}
        tensors = {
            name: zlib.crc32(b"".join(tensor.chunks()))
            for file in sums["headers"]
            for name, tensor in read_header(folder / file).items()
        }
    except Exception:  # whatever damage does
        return False
    return (files, headers, tensors) == (sums["files"], sums["headers"], sums["tensors"])


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in ``folder``, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
