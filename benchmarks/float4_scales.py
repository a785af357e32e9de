"""Perplexity of NVFP4 and MXFP4 by how the scales of blocks are chosen.

    python benchmarks/float4_scales.py MODEL CALIBRATION TEXT... [--schemes NVFP4A16] [--rows rtn]

CALIBRATION and each TEXT are text files. ``ROWS`` whose names end in ``4/6`` or ``expanded`` use
scales as another quantizer chooses them, with qplug's algorithm otherwise: ``4/6`` is ModelOpt 0.47
(the range of a block ends at code 6 or at code 4, by squared error); ``expanded`` is
``nvfp4_expanded_mse`` of llm-compressor 0.14 (111 ranges from 1.8 to 0.8 times the block's, by the
sum of errors to the power 2.4, under scales that are not rounded yet). The scale of the tensor is
qplug's, a power of two. Prints perplexities on each TEXT, and the mean error of the outputs of
layers on the calibration data, in percent.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qplug
from qplug import Algorithm, Block, Linear, NoParams, hookimpl
from qplug.numerics import as_stored, global_scale_of, round_codes
from qplug.registry.registry import Registry

#: Options of algorithms, and the pipeline, by row.
ROWS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "rtn-maxima": ("rtn", {"rtn": {"search": False}}),
    "rtn": ("rtn", {}),
    "rtn-4/6": ("four-over-six+rtn", {}),
    "rtn-expanded": ("expanded+rtn", {}),
    "awq": ("awq+rtn", {}),
    "awq-4/6": ("awq+four-over-six+rtn", {"awq": {"clip": False}}),
    "awq-expanded": ("awq+expanded+rtn", {"awq": {"clip": False}}),
    "gptq": ("gptq", {}),
    "gptq-maxima": ("gptq", {"gptq": {"clip": False}}),
    "gptq-4/6": ("four-over-six+gptq", {}),
    "gptq-expanded": ("expanded+gptq", {}),
    "awq+gptq": ("awq+gptq", {}),
}


class Chooser(Algorithm[NoParams]):
    """Set scales of linears, which the next algorithm keeps."""

    power = 2.0
    ranges: tuple[float, ...] = ()
    judges_stored = True

    def transform(self, block: Block) -> None:
        for linear in block.linears:
            linear.scale = self._chosen(linear)

    def _chosen(self, linear: Linear) -> Tensor:
        args, unit = linear.args, global_scale_of(linear)
        assert args.group_size is not None
        groups = linear.weight.float().unflatten(1, (-1, args.group_size))
        covering = groups.abs().amax(-1) / 6
        best, least = torch.zeros_like(covering), torch.full_like(covering, torch.inf)
        for ratio in self.ranges:
            scale = as_stored(covering * ratio, args, unit)
            judged = (scale if self.judges_stored else covering * ratio)[..., None]
            judged = judged.clamp(min=1e-30)
            error = (round_codes(groups, judged, None, args)[1] - groups).abs().pow_(self.power)
            error = error.sum(-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best


class FourOverSix(Chooser):
    """Ranges up to 6 or up to 4 codes, by squared error."""

    name = "four-over-six"
    ranges = (1.0, 1.5)


class Expanded(Chooser):
    """The search of ``nvfp4_expanded_mse``."""

    name = "expanded"
    power = 2.4
    ranges = tuple(1.8 * (1 - step / 200) for step in range(111))
    judges_stored = False


class Plugin:
    @hookimpl
    def qplug_algorithms(self) -> Iterable[type[Algorithm[Any]]]:
        return [FourOverSix, Expanded]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--schemes", default="NVFP4A16,MXFP4A16")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    registry = Registry.installed().with_(Plugin(), "choosers")
    for scheme in args.schemes.split(","):
        for row in args.rows.split(","):
            needs_data = "rtn" not in row.partition("-")[0] or scheme == "NVFP4"
            begun = time.monotonic()
            found = [
                _figures(row, scheme, seed, args, registry)
                for seed in (args.seeds if needs_data else args.seeds[:1])
            ]
            shown = [
                f"{sum(column) / len(column):.4f} ({', '.join(f'{one:.4f}' for one in column)})"
                for column in zip(*found, strict=True)
            ]
            spent = time.monotonic() - begun
            print(f"{scheme} {row}: {'; '.join(shown)}; {spent:.0f} s", flush=True)


def _figures(
    row: str, scheme: str, seed: int, args: argparse.Namespace, registry: Registry
) -> list[float]:
    algo, options = ROWS[row]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        qplug.quantize(
            args.model,
            out,
            algo=algo,
            scheme=scheme,
            backend="vllm",
            dataset="text",
            dataset_options={"path": args.calibration},
            samples=args.samples,
            batch_size=8,
            algorithm_options=options,
            seed=seed,
            device=args.device,
            registry=registry,
        )
        layers = json.loads((out / "qplug.json").read_text())["layers"].values()
        losses = [100 * layer["loss"] for layer in layers if layer.get("loss") is not None]
        found = [
            qplug.evaluate(
                str(out),
                dataset="text",
                dataset_options={"path": text},
                windows=args.windows,
                device=args.device,
            ).perplexity
            for text in args.texts
        ]
        return [*found, sum(losses) / len(losses)] if losses else found


if __name__ == "__main__":
    main()
