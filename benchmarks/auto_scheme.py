"""Compares ``--scheme auto`` with uniform schemes, a rule of thumb and AutoScheme of auto-round.

    python benchmarks/auto_scheme.py MODEL calib.txt eval-dev.txt wikitext-2-valid.txt \
        --algo rtn --bits 4.25,4.5 --seeds 0,1,2 --assignments assignment.json

A line for each folder: name, mean bits of a quantizable weight (from the tensors in the folder),
perplexity and KL divergence from the float model (thousandths of a nat) on each text. Assignments
of AutoScheme come from ``benchmarks/auto_round_assignment.py``; qplug quantizes them by the same
algorithm. ``--outliers 6`` measures the twin of the model in which so many channels of the input of
each block's attention and MLP are 20 times as large, and their weights as much smaller.

Bits of the rule, which no engine serves, are those that the tensors of SGLang's format would take.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qplug
from qplug import Scheme, preset
from qplug.machine.session import Session
from qplug.reading.folder import open_folder
from qplug.reading.load import load_folder
from qplug.reading.perplexity import evaluation_tokens

_FACTOR = 20.0


def with_outliers(model: Path, count: int, out: Path) -> Path:
    """The twin of the Llama or Qwen in ``model``, in ``out``: it computes the same."""
    shutil.copytree(model, out)
    out.chmod(0o755)
    (file,) = out.glob("*.safetensors")
    file.chmod(0o644)
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith("layernorm.weight")]:
        block = name.removesuffix(".weight").rpartition(".")[0]
        inner = "self_attn" if "input_layernorm" in name else "mlp"
        channels = torch.randperm(len(tensors[name]), generator=generator)[:count]
        tensors[name][channels] *= _FACTOR
        for linear, weight in tensors.items():
            reads = linear.endswith(
                ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight")
            ) or linear.endswith(("up_proj.weight", "gate.weight"))
            if linear.startswith(f"{block}.{inner}.") and reads:
                weight[:, channels] /= _FACTOR
    save_file(tensors, file, {"format": "pt"})
    return out


@torch.inference_mode()
def log_probabilities(folder: str, tokens: Tensor, session: Session) -> Iterator[Tensor]:
    """Yields the log-probabilities of the next token, ``[length, vocabulary]``, of each window."""
    net: Any = load_folder(open_folder(folder, session, or_float=True))
    net.to(session.device)
    for window in tokens.to(session.device):
        yield net(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)


def bits_of(folder: str, session: Session) -> float:
    """The mean bits of the weights that a quantizer may round, scales included."""
    opened = open_folder(folder, session)
    view, tensors = opened.view, opened.checkpoint.tensors
    names = {n for n in view.linears if n in view.quantizable}
    nbytes = sum(t.nbytes for n, t in tensors.items() if n.rpartition(".")[0] in names)
    if opened.exporter is not None and opened.exporter.name == "fake":
        form = session.registry.exporters.make("sglang", {}).format
        names, nbytes = {*opened.schemes}, 0
        for name, scheme in opened.schemes.items():
            stored = scheme.with_scale_dtype(form.scale_dtype(scheme, view.dtype))
            layout = form.layout(view.linears[name], stored, view.dtype)
            nbytes += sum(spec.nbytes for spec in layout.values())
    return 8 * nbytes / sum(math.prod(view.linears[n]) for n in names)


class Table:
    """Quantizes ``model`` in several ways, and prints a line for each."""

    def __init__(self, model: Path, texts: list[str], arguments: argparse.Namespace) -> None:
        self.model, self.arguments = model, arguments
        self.session = Session.alone(arguments.device)
        self.tokens = {
            Path(text).stem: evaluation_tokens(
                str(model),
                self.session,
                dataset="text",
                dataset_options={"path": text},
                seq_len=512,
                windows=arguments.windows,
            )
            for text in texts
        }
        self.expected = {
            text: [p.half() for p in log_probabilities(str(model), tokens, self.session)]
            for text, tokens in self.tokens.items()
        }
        self._print("float", 16.0, str(model))

    def row(self, name: str, **words: Any) -> float:
        """Quantize, print a line, and return the mean bits."""
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/out"
            qplug.quantize(
                str(self.model),
                out,
                **{
                    "algo": self.arguments.algo,
                    "backend": "sglang",
                    "dataset": "text",
                    "dataset_options": {"path": self.arguments.calib},
                    "samples": self.arguments.samples,
                    "seq_len": 512,
                    "device": self.arguments.device,
                    **words,
                },
            )
            bits = bits_of(out, self.session)
            self._print(name, bits, out)
            return bits

    @torch.inference_mode()
    def _print(self, name: str, bits: float, folder: str) -> None:
        cells = []
        for text, tokens in self.tokens.items():
            loss = divergence = 0.0
            found = log_probabilities(folder, tokens, self.session)
            for cpu, p, q in zip(tokens, self.expected[text], found, strict=True):
                p, window = p.float(), cpu.to(q.device)
                loss -= float(q[:-1].gather(1, window[1:, None]).sum())
                divergence += float((p.exp() * (p - q)).sum())
            count = tokens.numel()
            perplexity = math.exp(loss / (count - len(tokens)))
            cells += [f"{perplexity:.4f}", f"{1000 * divergence / count:.2f}"]
        print(f"| {name} | {bits:.3f} | {' | '.join(cells)} |", flush=True)


def schemes_of(assignment: Mapping[str, list[Any]], model: str) -> dict[str, Scheme]:
    """The schemes of an assignment of AutoScheme, by linear."""
    found = {}
    for name, (bits, size, symmetric) in assignment.items():
        if bits < 16 and ".layers." in name:
            scheme = preset(f"W{bits}A16{'' if symmetric else '_ASYM'}")
            found[name] = scheme.with_group_size(size)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("calib")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--algo", default="rtn")
    parser.add_argument("--bits", default="4.25,4.5,5")
    parser.add_argument("--uniform", default="W4A16:128,W4A16:64,W4A16:32,W4A16_ASYM:128")
    parser.add_argument("--uniform-seeds", default="0")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--sensitivity", default="fisher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--outliers", type=int, default=0)
    parser.add_argument("--rule", action="store_true", help="down_proj and v_proj in 8 bits")
    parser.add_argument("--assignments", nargs="*", default=[], help="one file for each seed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if arguments.outliers:
            model = with_outliers(model, arguments.outliers, Path(folder) / model.name)
        table = Table(model, arguments.texts, arguments)
        for uniform in filter(None, arguments.uniform.split(",")):
            scheme, size = uniform.split(":")
            for seed in arguments.uniform_seeds.split(","):
                words = {"scheme": scheme, "group_size": int(size), "seed": int(seed)}
                table.row(f"{scheme} g{size}, seed {seed}", **words)
        for seed in arguments.uniform_seeds.split(",") if arguments.rule else ():
            table.row(
                f"W4A16 g128, down_proj and v_proj W8A16, seed {seed}",
                backend="fake",
                overrides={"*down_proj": "W8A16", "*v_proj": "W8A16"},
                seed=int(seed),
            )
        seeds = arguments.seeds.split(",")
        for seed, file in zip(seeds, arguments.assignments, strict=False):
            for target, assignment in json.loads(Path(file).read_text()).items():
                table.row(
                    f"AutoScheme, {target} bits, {Path(file).stem}",
                    scheme="W8A16",
                    seed=int(seed),
                    overrides=schemes_of(assignment, str(model)),
                )
        for bits in filter(None, arguments.bits.split(",")):
            for seed in seeds:
                table.row(
                    f"auto, {bits} bits, seed {seed}",
                    scheme="auto",
                    bits=float(bits),
                    seed=int(seed),
                    sensitivity=arguments.sensitivity,
                )


if __name__ == "__main__":
    main()
