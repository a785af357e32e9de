"""Perplexity after SignRound and after TesseraQ, on the same steps over the same data.

    python benchmarks/learned_rounding.py MODEL CALIBRATION HELD_BACK [--scheme W3A16] [--epochs 10]

CALIBRATION and HELD_BACK are text files. Each seed takes other windows of the first. TesseraQ is
here, as a plugin, to tell which of the two qplug should bring.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

import qplug
from qplug import Algorithm, Block, Linear, Param, QplugError, QuantizedWeight, hookimpl
from qplug.api.groups import in_groups, out_of_groups, per_row_scale
from qplug.numerics.learning import learn, learns_ranges, start_clips
from qplug.numerics.rounding import quantize
from qplug.numerics.scales import scale_of
from qplug.numerics.straight_through import stretched
from qplug.registry.registry import Registry


@dataclass(frozen=True)
class Params:
    epochs: Annotated[int, Param("Passes over the calibration data: as many stages.", 1)] = 10
    reach: Annotated[float, Param("How far the steps of a rounding variable can add up to.")] = 3.0
    scale_reach: Annotated[float, Param("The same of what scales are multiplied with.")] = 0.3


class TesseraQ(Algorithm[Params]):
    """Learn soft roundings that are made hard stage by stage (Li and Panda, arXiv 2410.19103)."""

    name = "tesseraq"
    Params = Params
    needs_data = True
    learns_blocks = True

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        params, reconstruction = self.params, block.reconstruction
        if reconstruction is None:
            raise QplugError("tesseraq learns from calibration data, but this run has none")
        start_clips(block.groups, steps=20, smallest=0.6)
        learned = {linear.name: Softened(linear) for linear in block.linears}
        roundings = [soft.rounding for soft in learned.values()]
        factors = [soft.factor for soft in learned.values() if soft.factor is not None]
        steps = params.epochs * reconstruction.steps
        optimizer = torch.optim.Adam(
            [
                {"params": roundings, "lr": params.reach / steps},
                *([{"params": factors, "lr": params.scale_reach / steps}] if factors else []),
            ]
        )
        for stage in range(params.epochs):
            for soft in learned.values():
                soft.harden((1 - (stage + 1) / params.epochs) ** 2)
            if stage < params.epochs - 1 or factors:
                learn(
                    reconstruction,
                    lambda: {f"{name}.weight": soft.weight() for name, soft in learned.items()},
                    [*roundings, *factors],
                    optimizer,
                    epochs=1,
                )
        return {name: soft.codes() for name, soft in learned.items()}


class Softened:
    """What is learned of one linear, whose integers lie ``sigmoid(rounding)`` above the floor."""

    def __init__(self, linear: Linear) -> None:
        self._args = linear.args
        scale, zero = scale_of(linear)
        self._scale, self._zero = scale, None if zero is None else zero.float()
        quotient = in_groups(linear.weight, linear.args) / self._in_rows(scale, linear.weight)
        exact = out_of_groups(quotient, linear.weight.shape[1], linear.weight.shape[0])
        self._floor = exact.floor()
        self.rounding = torch.logit((exact - self._floor).clamp(1e-3, 1 - 1e-3))
        self.rounding.requires_grad_()
        self._soft = torch.ones_like(exact, dtype=torch.bool)
        self.factor = None
        if learns_ranges(linear.args):
            self.factor = torch.zeros_like(scale, requires_grad=True)

    def harden(self, share: float) -> None:
        """Let a ``share`` of all stay soft: those that are nearest to the middle."""
        undecided = 0.5 - (self.rounding.detach().sigmoid() - 0.5).abs()
        undecided[~self._soft] = -1
        count = int(share * undecided.numel())
        soft = torch.zeros_like(self._soft).view(-1)
        soft[undecided.view(-1).topk(count).indices] = True
        self._soft &= soft.view_as(self._soft)

    def weight(self) -> Tensor:
        """What codes that need not be whole stand for, with gradients."""
        up = self.rounding.sigmoid()
        whole = self._floor + torch.where(self._soft, up, (up > 0.5).float().detach())
        scale, zero = self._range()
        low, high = self._args.code_range
        groups = in_groups(whole, self._args)
        if zero is None:
            codes = groups.clamp(low, high)
        else:
            zeros = self._in_rows(zero, whole)
            codes = (groups + zeros).clamp(low, high) - zeros
        codes = codes * self._in_rows(scale, whole)
        return out_of_groups(codes, whole.shape[1], whole.shape[0])

    @torch.no_grad()
    def codes(self) -> QuantizedWeight:
        scale, zero = self._range()
        codes = quantize(self.weight(), scale, zero, self._args)
        return QuantizedWeight(
            codes, scale, None if zero is None else zero.to(torch.uint8), self._args
        )

    def _range(self) -> tuple[Tensor, Tensor | None]:
        if self.factor is None:
            return self._scale, self._zero
        factors = [2 * self.factor.sigmoid()] * (1 if self._zero is None else 2)
        return stretched(self._scale, self._zero, factors, self._args)

    def _in_rows(self, values: Tensor, weight: Tensor) -> Tensor:
        return per_row_scale(values.float(), weight, self._args)


class Plugin:
    @hookimpl
    def qplug_algorithms(self) -> Iterable[type[Algorithm[Any]]]:
        return [TesseraQ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "calibration", "held_back"):
        parser.add_argument(name)
    parser.add_argument("--scheme", default="W3A16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    registry = Registry.installed().with_(Plugin(), "tesseraq")
    pipelines = ("signround", "tesseraq", "awq+signround", "awq+tesseraq")
    print("seed", *pipelines, sep="\t", flush=True)
    for seed in args.seeds:
        found = [perplexity(algo, seed, args, registry) for algo in pipelines]
        print(seed, *(f"{value:.4f}" for value in found), sep="\t", flush=True)


def perplexity(algo: str, seed: int, args: argparse.Namespace, registry: Registry) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        qplug.quantize(
            args.model,
            out,
            algo=algo,
            scheme=args.scheme,
            group_size=args.group_size,
            backend="fake",
            dataset="text",
            dataset_options={"path": args.calibration},
            samples=args.samples,
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            algorithm_options={algo.rpartition("+")[2]: {"epochs": args.epochs}},
            seed=seed,
            device=args.device,
            registry=registry,
        )
        return qplug.evaluate(
            str(out),
            dataset="text",
            dataset_options={"path": args.held_back},
            windows=args.windows,
            device=args.device,
        ).perplexity


if __name__ == "__main__":
    main()
