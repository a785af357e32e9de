"""Perplexity after qplug, auto-round and llm-compressor on the same windows, format by format.

    python benchmarks/lowest_loss.py MODELS DATA OUT [--gpus 4] [--jobs 6] [--seconds 500]

MODELS is a folder with ``ref-19m`` and ``ref-moe-27m`` (or one of them), DATA a folder with
``calib.txt``, ``eval-dev.txt`` and ``wikitext-2-valid.txt``. Each row of the table is a process
that quantizes a model into a folder and measures the folder by ``qplug.evaluate``, whatever wrote
it. Rows are printed, and added to ``OUT/results.txt``, as they are ready; the most important ones
run first:

    model|format|tool|command|seed|eval-dev|WikiText-2|seconds

Every tool is given the same windows of the calibration text. ``twin`` is ``ref-19m`` with outliers
(``with_outliers`` of ``auto_scheme.py``). auto-round runs by its own defaults (200 steps of 8
windows); formats that it does not write (W4A8, W4A4) are measured with its weights and the inputs
rounded by qplug. A row that fails, or takes longer than ``--limit``, gives the end of its message.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from auto_scheme import with_outliers
from safetensors.torch import load_file, save_file
from torch import Tensor

import qplug
from qplug.machine.session import Session
from qplug.model.tokenizer import load_tokenizer
from qplug.reading.perplexity import evaluation_tokens, mean_loss
from qplug.text.windows import sample

TEXTS = ("eval-dev.txt", "wikitext-2-valid.txt")
#: Group sizes that are not the preset's.
GROUPS = {"W2A16": 64}
#: Formats that auto-round computes but does not write.
NOT_WRITTEN = ("W4A8", "W4A4")
FOUR_BIT_FLOATS = ("NVFP4", "MXFP4")

_E12, _E30 = "-o signround.epochs=12", "-o signround.epochs=30"
_OMNI = f"awq+omniquant+signround -o omniquant.epochs=10 {_E30}"
_ONLINE = "-o quarot.online=true"
#: Commands of qplug by format, in stages: the likely best first.
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "W4A16": (
        (f"signround {_E12}", f"awq+signround {_E12}"),
        (f"quarot+signround {_E12}", "gptq", "awq+gptq"),
        (f"signround {_E30}", _OMNI),
    ),
    "W3A16": (
        (f"signround {_E12}", f"awq+signround {_E12}"),
        (f"quarot+signround {_E12}", "gptq", "awq+gptq"),
        (f"signround {_E30}", _OMNI),
    ),
    "W2A16": (
        (f"signround {_E12}", f"awq+signround {_E30}"),
        (f"quarot+signround {_E30}", "gptq"),
        (f"signround {_E30}", _OMNI),
    ),
    "NVFP4": (
        ("gptq", f"signround {_E12}"),
        ("awq+gptq", f"awq+signround {_E12}", "quarot+gptq"),
        (f"quarot+signround {_E12}", f"signround {_E30}"),
    ),
    "MXFP4": (
        ("gptq", f"signround {_E12}"),
        ("awq+gptq", f"awq+signround {_E12}", "quarot+gptq"),
        (f"quarot+signround {_E12}", f"signround {_E30}"),
    ),
    "W4A8": (
        (f"signround {_E12}",),
        (f"awq+signround {_E12}", f"quarot+signround {_E12}"),
        ("quarot+gptq", f"signround {_E30}"),
    ),
    "W4A4": (
        (f"quarot+gptq {_ONLINE}", f"quarot+signround {_E12} {_ONLINE}"),
        ("quarot+gptq", "spinquant+gptq", f"spinquant+signround {_E12}"),
        (f"quarot+signround {_E30} {_ONLINE}",),
    ),
}


@dataclass(frozen=True)
class Row:
    """One command and where its figures belong; rows of a lower stage run first."""

    stage: int
    model: str
    scheme: str
    tool: str
    command: str
    seed: int

    def __str__(self) -> str:
        return f"{self.model}|{self.scheme}|{self.tool}|{self.command}|{self.seed}"


def rows(models: list[str], seeds: list[int]) -> Iterator[Row]:
    """Yields the rows of ``models``, whose order is the order within a stage."""
    for model in models:
        yield Row(0, model, "bf16", "float", "", 0)
        for scheme, stages in COMMANDS.items():
            late = 2 if scheme in NOT_WRITTEN else 0
            for seed in seeds:
                for stage, commands in enumerate(stages):
                    for command in commands:
                        yield Row(2 * stage + late, model, scheme, "qplug", command, seed)
                for stage, command in ((0, "200 steps"), (3, "200 steps, alg_ext")):
                    yield Row(stage + late, model, scheme, "auto-round", command, seed)
                for command in ("gptq", "awq"):
                    yield Row(1 + late, model, scheme, "llm-compressor", command, seed)


class Bench:
    """Quantizes and measures one row in its own process."""

    def __init__(self, arguments: argparse.Namespace, models: dict[str, Path]) -> None:
        self.arguments, self.models = arguments, models

    def run(self, row: Row) -> str:
        """Returns perplexities and seconds, ``eval-dev|WikiText-2|seconds``."""
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "out"
            folder = self._written(row, folder)
            seconds = time.monotonic() - begun
            found = [f"{self._perplexity(folder, text):.4f}" for text in TEXTS]
            if self.arguments.own and row.tool not in ("float", "qplug"):
                dtype = torch.bfloat16 if row.scheme in FOUR_BIT_FLOATS else torch.float32
                found.append(f"own {self._own_perplexity(folder, dtype):.4f}")
        return "|".join([*found, f"{seconds:.0f}"])

    def _written(self, row: Row, out: Path) -> Path:
        if row.tool == "float":
            return self.models[row.model]
        by: dict[str, Callable[[Row, Path], None]] = {
            "qplug": self._qplug,
            "auto-round": self._auto_round,
            "llm-compressor": self._llm_compressor,
        }
        by[row.tool](row, out)
        return out

    def _qplug(self, row: Row, out: Path) -> None:
        algo, *words = row.command.split()
        options: dict[str, dict[str, Any]] = {}
        for word in words:
            if word != "-o":
                option, value = word.split("=")
                name, key = option.split(".")
                options.setdefault(name, {})[key] = json.loads(value)
        for given in options.values():
            if "epochs" in given:
                given["epochs"] = min(given["epochs"], self.arguments.epochs_at_most)
        qplug.quantize(
            str(self.models[row.model]),
            out,
            algo=algo,
            scheme=row.scheme,
            group_size=GROUPS.get(row.scheme),
            backend="fake" if row.scheme == "W4A4" else "compressed-tensors",
            dataset="text",
            dataset_options={"path": str(self.arguments.data / "calib.txt")},
            samples=self.arguments.samples,
            seq_len=self.arguments.seq_len,
            batch_size=8,
            algorithm_options=options,
            seed=row.seed,
            device=self.arguments.device,
        )

    def _windows(self, row: Row) -> list[Tensor]:
        """The windows on which qplug calibrates, int64 ``[1, length]`` each."""
        session = Session.alone("cpu")
        path = str(self.arguments.data / "calib.txt")
        source = session.registry.datasets.make("text", {"path": path})
        tokenizer = load_tokenizer(str(self.models[row.model]), trust_remote_code=False)
        length, count = self.arguments.seq_len, self.arguments.samples
        drawn = sample(source, tokenizer, "dataset", length=length, count=count, seed=row.seed)
        return [window[None] for window in drawn]

    def _auto_round(self, row: Row, out: Path) -> None:
        from auto_round import AutoRound
        from auto_round.schemes import QuantizationScheme

        scheme: Any = "W2A16G64" if row.scheme == "W2A16" else row.scheme
        if row.scheme in NOT_WRITTEN:
            width, inputs = (128, 8) if row.scheme == "W4A8" else (-1, 4)
            scheme = QuantizationScheme(
                4, width, True, "int", inputs, -1, True, "int", act_dynamic=True
            )
        rounder = AutoRound(
            str(self.models[row.model]),
            scheme=scheme,
            iters=min(200, self.arguments.steps_at_most),
            seqlen=self.arguments.seq_len,
            nsamples=self.arguments.samples,
            dataset=self._windows(row),
            seed=row.seed,
            device_map=self.arguments.device,
            enable_torch_compile=False,
            **({"enable_alg_ext": True} if "alg_ext" in row.command else {}),
        )
        form = "fake" if row.scheme in NOT_WRITTEN else "llm_compressor"
        saved = out.with_name("saved")
        rounder.quantize_and_save(str(saved), format=form)
        (config,) = sorted(saved.rglob("config.json"))
        shutil.move(config.parent, out)
        if form == "fake":
            _round_inputs(self.models[row.model], out, row.scheme)

    def _llm_compressor(self, row: Row, out: Path) -> None:
        from compressed_tensors.quantization import preset_name_to_scheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.awq import AWQModifier
        from llmcompressor.modifiers.quantization import GPTQModifier
        from transformers import AutoModelForCausalLM

        if not torch.cuda.is_available():  # its AWQ pins memory even without an accelerator
            torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]
        model = AutoModelForCausalLM.from_pretrained(self.models[row.model], dtype=torch.bfloat16)
        windows = [window[0].tolist() for window in self._windows(row)]
        scheme = preset_name_to_scheme(row.scheme, ["Linear"])
        if row.scheme in GROUPS:
            scheme.weights.group_size = GROUPS[row.scheme]
        if row.scheme == "W4A4":  # rows, as qplug and auto-round take them
            scheme.weights.strategy, scheme.weights.group_size = "channel", None
        modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[row.command]
        oneshot(
            model=model.eval(),
            recipe=[modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])],
            dataset=Dataset.from_dict(
                {"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]}
            ),
            max_seq_length=self.arguments.seq_len,
            num_calibration_samples=len(windows),
        )
        packed = {"quantization_format": "pack-quantized"} if row.scheme == "W4A8" else {}
        model.to(torch.bfloat16).save_pretrained(out, save_compressed=True, **packed)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(self.models[row.model] / name, out)

    def _perplexity(self, folder: Path, text: str) -> float:
        return qplug.evaluate(
            str(folder),
            dataset="text",
            dataset_options={"path": str(self.arguments.data / text)},
            windows=self.arguments.windows,
            device=self.arguments.device,
        ).perplexity

    def _own_perplexity(self, folder: Path, dtype: torch.dtype) -> float:
        """What transformers and compressed-tensors compute from ``folder`` on the first text."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        tokens = evaluation_tokens(
            str(folder),
            Session.alone("cpu"),
            dataset="text",
            dataset_options={"path": str(self.arguments.data / TEXTS[0])},
            seq_len=512,
            windows=self.arguments.windows,
        )
        loss = mean_loss(model.to(self.arguments.device).eval(), tokens, lambda *_: None)
        return float(torch.tensor(loss).exp())


def _round_inputs(model: Path, folder: Path, scheme: str) -> None:
    """Make ``folder``, of dequantized weights, one whose inputs qplug rounds by ``scheme``."""
    weights: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    shutil.rmtree(folder)
    qplug.quantize(str(model), folder, algo="rtn", scheme=scheme, backend="fake", device="cpu")
    for file in folder.glob("*.safetensors"):
        names = load_file(file)
        save_file({name: weights[name].contiguous() for name in names}, file, {"format": "pt"})


def _child(bench: Bench, row: Row, gpu: int | None, answer: Path) -> None:
    """Run ``row`` in this process, and write its line to ``answer``."""
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    log = io.StringIO()
    try:
        with redirect_stdout(log), redirect_stderr(log):
            found = bench.run(row)
    except BaseException as error:  # the row says what went wrong
        if bench.arguments.debug:
            traceback.print_exc()
        words = " ".join(str(error).split())[-160:]
        found = f"{type(error).__name__}: {words}"
    answer.write_text(found)


def main() -> None:
    """Work through the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, default=1, help="0 runs on the CPU")
    parser.add_argument("--jobs", type=int, default=6, help="processes of a GPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="time for all rows")
    parser.add_argument("--limit", type=float, default=200, help="seconds of a row")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="a pattern of the rows to run")
    parser.add_argument("--rows", type=Path, help="rows in their order, as --list prints them")
    parser.add_argument("--done", type=Path, help="results of an earlier run, not run again")
    parser.add_argument("--list", action="store_true", help="print the rows alone")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--steps-at-most", type=int, default=200)
    parser.add_argument("--epochs-at-most", type=int, default=1000)
    parser.add_argument("--own", action="store_true", help="what a peer reads from its folder too")
    parser.add_argument("--debug", action="store_true")
    arguments = parser.parse_args()
    arguments.device = "cuda" if arguments.gpus else "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    with tempfile.TemporaryDirectory() as work:
        found = [arguments.models / name for name in ("ref-19m", "ref-moe-27m")]
        models = {folder.name: folder for folder in found if folder.is_dir()}
        if "ref-19m" in models:
            models["twin"] = with_outliers(models["ref-19m"], 6, Path(work) / "twin")
        order = [name for name in ("ref-19m", "twin", "ref-moe-27m") if name in models]
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        queue = sorted(rows(order, seeds), key=lambda row: row.stage)
        if arguments.gpus <= 1:  # a table of one model at a time
            queue.sort(key=lambda row: order.index(row.model))
        if arguments.rows:
            known = {str(row): row for row in queue}
            queue = [known[line] for line in arguments.rows.read_text().splitlines()]
        done = arguments.done.read_text().splitlines() if arguments.done else []
        finished = {line.rsplit("|", 3)[0] for line in done if re.search(r"\|\d+$", line)}
        queue = [
            row for row in queue if re.search(arguments.only, str(row)) and str(row) not in finished
        ]
        if arguments.list:
            print(*queue, sep="\n")
        else:
            _work(queue, Bench(arguments, models), Path(work))


def _work(queue: list[Row], bench: Bench, work: Path) -> None:
    """Run ``queue`` by several processes at once, until the time is over."""
    arguments = bench.arguments
    fork, begun, number = get_context("fork"), time.monotonic(), 0
    running: dict[Any, tuple[Row, int, Path, float]] = {}
    free = [gpu for _ in range(arguments.jobs) for gpu in range(max(1, arguments.gpus))]
    with (arguments.out / "results.txt").open("a") as results:
        while queue or running:
            over = time.monotonic() - begun > arguments.seconds
            while queue and free and not over:
                gpu, row, number = free.pop(0), queue.pop(0), number + 1
                answer = work / f"answer{number}"
                where = gpu if arguments.gpus else None
                process = fork.Process(target=_child, args=(bench, row, where, answer))
                process.start()
                running[process] = (row, gpu, answer, time.monotonic())
            for process, (row, gpu, answer, start) in list(running.items()):
                late = over or time.monotonic() - start > arguments.limit
                if process.is_alive() and not late:
                    continue
                process.kill()
                process.join()
                said = answer.read_text() if answer.exists() else ""
                line = f"{row}|{said or ('Error: no time' if late else 'Error: died')}"
                print(line, flush=True)
                print(line, file=results, flush=True)
                free.append(gpu)
                del running[process]
            if over and not running:
                break
            time.sleep(0.1)
    print(f"{len(queue)} rows left after {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
