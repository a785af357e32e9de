"""HQQ, half-quadratic quantization (Badri and Shaji, mobiusml.github.io/hqq_blog, 2023).

For the errors ``W - W'`` of rounding, the sum of ``|w - w'|^p`` with ``p < 1`` is made small: a
weight that is far off counts little more than one that is a little off, so the few large weights
do not draw the grid to them. With a second variable ``E`` for the error (equation 2)::

    min over E, z, s   |E|_p^p + beta / 2 |E - (W - W')|^2

is solved in turns: ``E`` by a generalized soft threshold (equation 4), the zero point ``z`` or the
scale ``s`` of each group by least squares (equation 6), with ``beta`` growing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from qplug import Algorithm, Block, Linear, Param, QuantArgs, QuantizedWeight, Scheme
from qplug.numerics import as_stored, nearest, quantize, round_codes, scale_of

#: Weights that are solved for at a time.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}


@dataclass(frozen=True)
class Params:
    lp_norm: Annotated[float, Param("The power p of errors that are summed.", 0.1, 1)] = 0.7
    beta: Annotated[float, Param("Weight of the penalty, errors in steps of the grid.", 0.01)] = 10
    kappa: Annotated[float, Param("What beta grows by in each iteration.", 1, 10)] = 1.01
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
                    "solves for grids of integers that a group or a row of weights has for itself, "
                    f"which {scheme.name} does not have; rtn takes it"
                )
        return None

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        return {linear.name: self._solve(linear) for linear in block.linears}

    def _solve(self, linear: Linear) -> QuantizedWeight:
        """Starts from the scales that cover; those that an algorithm before found on data stay."""
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
        """The best grid that the iterations come by, for ``groups: [rows, groups, size]``."""
        params, beta = self.params, self.params.beta
        codes, error = grid.round(groups)
        best, least = grid, _norm(error, params.lp_norm)
        for _ in range(params.iterations):
            if grid.zero is not None:
                aim = groups - grid.scale * shrink(error / grid.scale, beta, params.lp_norm)
                grid = grid.moved(codes, aim)
                codes, error = grid.round(groups)
            aim = groups - grid.scale * shrink(error / grid.scale, beta, params.lp_norm)
            grid = grid.stretched(codes, aim)
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
        """That of scales and zero points as they are stored, ``[rows, groups]``."""
        return cls(scale[..., None], None if zero is None else zero[..., None].float(), args)

    def round(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes, less the zero point, and the errors ``W - W'``."""
        codes, restored = round_codes(groups, self.scale, self.zero, self.args)
        return (codes if self.zero is None else codes - self.zero), groups - restored

    def moved(self, codes: Tensor, aim: Tensor) -> _Grid:
        """The zero point that brings ``codes`` closest to ``aim`` (equation 6): a whole number."""
        assert self.zero is not None
        zero = (codes + self.zero - aim / self.scale).mean(-1, keepdim=True)
        return replace(self, zero=zero.round_().clamp_(*self.args.code_range))

    def stretched(self, codes: Tensor, aim: Tensor) -> _Grid:
        """The scale that brings ``codes`` closest to ``aim``."""
        products = (codes * aim).sum(-1, keepdim=True)
        scale = products / codes.square().sum(-1, keepdim=True).clamp_(min=1e-9)
        return replace(self, scale=as_stored(torch.where(scale > 0, scale, self.scale), self.args))

    def where(self, keep: Tensor, other: _Grid) -> _Grid:
        """This one where ``keep: [rows, groups, 1]``, and ``other`` elsewhere."""
        zero = None
        if self.zero is not None and other.zero is not None:
            zero = torch.where(keep, self.zero, other.zero)
        return _Grid(torch.where(keep, self.scale, other.scale), zero, self.args)


def shrink(error: Tensor, beta: float, power: float) -> Tensor:
    """The ``E`` of least ``|E|_p^p + beta / 2 |E - error|^2``, to first order (equation 4)."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(power - 1) / beta).clamp_(min=0)


def _norm(error: Tensor, power: float) -> Tensor:
    """The sum of ``|error|^p`` of each group, ``[rows, groups, 1]``."""
    return error.abs().pow_(power).sum(-1, keepdim=True)
