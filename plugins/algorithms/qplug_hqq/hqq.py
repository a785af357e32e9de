"""HQQ, half-quadratic quantization (Badri and Shaji, mobiusml.github.io/hqq_blog, 2023).

HQQ minimises the sum of ``|w - w'|^p`` over the rounding errors ``W - W'``, with ``p < 1``. A large
error counts little more than a small one, so the few large weights do not widen the grid. With a
second variable ``E`` for the error (equation 2)::

    min over E, z, s   |E|_p^p + beta / 2 |E - (W - W')|^2

is solved by turns: ``E`` by a generalized soft threshold (equation 4), the zero point ``z`` or the
scale ``s`` of each group by least squares (equation 6), while ``beta`` grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from qplug import Algorithm, Block, Linear, Param, QuantArgs, QuantizedWeight, Scheme
from qplug.numerics import as_stored, nearest, quantize, round_codes, scale_of

#: Weights that are solved at a time.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}


@dataclass(frozen=True)
class Params:
    lp_norm: Annotated[float, Param("The power p of errors that are summed.", 0.1, 1)] = 0.7
    beta: Annotated[float, Param("Weight of the penalty, errors in steps of the grid.", 0.01)] = 10
    kappa: Annotated[float, Param("Growth factor of beta in each iteration.", 1, 10)] = 1.01
    iterations: Annotated[int, Param("Iterations at most.", 1, also=("iters",))] = 20


class HQQ(Algorithm[Params]):
    """Find scales and zero points under which errors of rounding are sparse; needs no data."""

    name = "hqq"
    Params = Params

    def refuses(self, schemes: Sequence[Scheme]) -> str | None:
        for scheme in schemes:
            args = scheme.weights
            if args.is_float or args.strategy not in ("group", "channel"):
                return (
                    "solves for integer grids of a group or a row of weights, which "
                    f"{scheme.name} does not have; use rtn for it"
                )
        return None

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        return {linear.name: self._solve(linear) for linear in block.linears}

    def _solve(self, linear: Linear) -> QuantizedWeight:
        """Starts from covering scales; scales that an earlier algorithm has chosen are kept."""
        if linear.scale is not None:
            return nearest(linear)
        args, (scale, zero) = linear.args, scale_of(linear)
        size = args.group_size or linear.weight.shape[1]
        rows = max(1, _CHUNK[linear.weight.device.type] // linear.weight.shape[1])
        solved = []
        for start in range(0, len(linear.weight), rows):
            part = slice(start, start + rows)
            groups = linear.weight[part].float().unflatten(1, (-1, size))
            zeros = None if zero is None else zero[part]
            solved.append(self._grid(groups, _Grid.of(scale[part], zeros, args)))
        scale = torch.cat([grid.scale[..., 0] for grid in solved])
        if zero is not None:
            zero = torch.cat([grid.zero[..., 0] for grid in solved if grid.zero is not None])
            zero = zero.to(torch.uint8)
        return QuantizedWeight(quantize(linear.weight, scale, zero, args), scale, zero, args)

    def _grid(self, groups: Tensor, grid: _Grid) -> _Grid:
        """The grid of least norm among all iterations, for ``groups: [rows, groups, size]``."""
        params, beta = self.params, self.params.beta
        codes, error = grid.round(groups)
        best, least = grid, _norm(error, params.lp_norm)
        for _ in range(params.iterations):
            if grid.zero is not None:
                target = groups - grid.scale * shrink(error / grid.scale, beta, params.lp_norm)
                grid = grid.moved(codes, target)
                codes, error = grid.round(groups)
            target = groups - grid.scale * shrink(error / grid.scale, beta, params.lp_norm)
            grid = grid.stretched(codes, target)
            codes, error = grid.round(groups)
            norm = _norm(error, params.lp_norm)
            best, least = best.where(norm >= least, grid), torch.minimum(least, norm)
            beta *= params.kappa
        return best


@dataclass(frozen=True)
class _Grid:
    """Scales and zero points, float32 ``[rows, groups, 1]``."""

    scale: Tensor
    zero: Tensor | None
    args: QuantArgs

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor | None, args: QuantArgs) -> _Grid:
        """The grid of stored scales and zero points, ``[rows, groups]``."""
        return cls(scale[..., None], None if zero is None else zero[..., None].float(), args)

    def round(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes minus the zero point, and the errors ``W - W'``."""
        codes, restored = round_codes(groups, self.scale, self.zero, self.args)
        return (codes if self.zero is None else codes - self.zero), groups - restored

    def moved(self, codes: Tensor, target: Tensor) -> _Grid:
        """The whole zero point that brings ``codes`` closest to ``target`` (equation 6)."""
        assert self.zero is not None
        zero = (codes + self.zero - target / self.scale).mean(-1, keepdim=True)
        return replace(self, zero=zero.round_().clamp_(*self.args.code_range))

    def stretched(self, codes: Tensor, target: Tensor) -> _Grid:
        """The scale that brings ``codes`` closest to ``target``."""
        products = (codes * target).sum(-1, keepdim=True)
        scale = products / codes.square().sum(-1, keepdim=True).clamp_(min=1e-9)
        return replace(self, scale=as_stored(torch.where(scale > 0, scale, self.scale), self.args))

    def where(self, keep: Tensor, other: _Grid) -> _Grid:
        """This grid where ``keep: [rows, groups, 1]`` is true, and ``other`` elsewhere."""
        zero = None
        if self.zero is not None and other.zero is not None:
            zero = torch.where(keep, self.zero, other.zero)
        return _Grid(torch.where(keep, self.scale, other.scale), zero, self.args)


def shrink(error: Tensor, beta: float, power: float) -> Tensor:
    """The minimiser ``E`` of ``|E|_p^p + beta / 2 |E - error|^2``, to first order (equation 4)."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(power - 1) / beta).clamp_(min=0)


def _norm(error: Tensor, power: float) -> Tensor:
    """The sum of ``|error|^p`` of each group, ``[rows, groups, 1]``."""
    return error.abs().pow_(power).sum(-1, keepdim=True)
