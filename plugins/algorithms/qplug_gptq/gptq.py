"""GPTQ (Frantar et al., arXiv 2210.17323), on the Gram matrices of input groups.

Rows are independent, so linears that read one tensor are solved together, with one factorisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import torch
from torch import Tensor

from qplug import Algorithm, Block, InputGroup, Linear, Param, QuantizedWeight
from qplug.numerics import (
    nearest,
    range_scale,
    scale_of,
    search_clip,
    unclipped_ratio,
    weight_range,
)
from qplug_gptq.solver import corrected, inverse_factor, solve


@dataclass(frozen=True)
class Params:
    damp: Annotated[
        float, Param("Added to the diagonal, as a part of its mean.", 0, 1, ("percdamp",))
    ] = 0.05
    act_order: Annotated[
        bool, Param("Columns with large inputs first; groups stay in place.", also=("actorder",))
    ] = True
    block_size: Annotated[
        int, Param("Columns between updates of the rest.", 1, also=("blocksize",))
    ] = 128
    true_sequential: Annotated[
        bool, Param("Groups see what became of the groups before them in the block.")
    ] = False
    correct: Annotated[
        float, Param("How much of what inputs drifted from the float model's is made good.", 0, 1)
    ] = 0.0
    clip: Annotated[
        bool, Param("Search clips first, of fewer than 8 bits, where no algorithm before has.")
    ] = True
    clip_steps: Annotated[int, Param("Steps of the clip search.", 1)] = 20
    clip_smallest: Annotated[float, Param("The smallest range, of the full one.", 0.05, 1)] = 0.6


class GPTQ(Algorithm[Params]):
    """Round column by column, and push each error onto the columns still to come."""

    name = "gptq"
    Params = Params
    needs_data = True

    @property
    def needs_drift(self) -> bool:
        return self.params.correct > 0

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        codes: dict[str, QuantizedWeight] = {}
        in_turn = [[*alike] for _, alike in groupby(block.groups, lambda g: g.experts or id(g))]
        for groups in in_turn if self.params.true_sequential else [block.groups]:
            if codes:
                block.advance(codes)
            parts = [part for group in groups for part in group.parts]
            for solved in block.spread(parts, self._solve, cost=_cost):
                codes.update(solved.codes)
                block.notes.extend(solved.notes)
        for linear in block.linears:
            if linear.name not in codes:  # nothing was seen to enter it
                codes[linear.name] = nearest(linear)
                block.notes.append(f"{linear.name}: no token reached it; rounded to nearest")
        return codes

    def _solve(self, group: InputGroup) -> _Solved:
        params = self.params
        if not group.tokens:  # an expert that none was routed to
            return _Solved({linear.name: nearest(linear) for linear in group.linears}, [])
        order = torch.argsort(group.gram.diagonal(), descending=True, stable=True)
        if not params.act_order:
            order = torch.arange(len(order), device=order.device)
        factor, damp = inverse_factor(group.gram, order, params.damp)
        notes = []
        if damp > params.damp:
            names = ", ".join(linear.name for linear in group.linears)
            notes.append(f"{names}: damping was raised from {params.damp:g} to {damp:g}")
        codes = {}
        for linear in group.linears:
            weight = linear.weight
            if params.correct and group.drift is not None:
                weight = corrected(weight, group.drift, factor, order, params.correct)
            scale, zero = self._scale(linear, weight, group.gram)
            made = solve(weight, scale, zero, linear.args, factor, order, params.block_size)
            codes[linear.name] = QuantizedWeight(made, scale, zero, linear.args)
        return _Solved(codes, notes)

    def _scale(self, linear: Linear, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scales that were chosen for ``linear``, or those for ``weight``, its correction."""
        params = self.params
        if linear.scale is not None:
            return scale_of(linear)
        if params.clip and linear.args.bits < 8:
            aim = Linear(linear.name, weight, linear.args, global_scale=linear.global_scale)
            search_clip(aim, gram, steps=params.clip_steps, smallest=params.clip_smallest)
            return scale_of(aim)
        # An error that the later columns make good is cheaper than one at a range's end.
        low, high = weight_range(weight, linear.args)
        ratio = unclipped_ratio(linear.args)
        return range_scale(low * ratio, high * ratio, linear.args, linear.global_scale)


@dataclass(frozen=True)
class _Solved:
    """What became of an input group: codes by linear, and what the user is told."""

    codes: dict[str, QuantizedWeight]
    notes: list[str]


def _cost(group: InputGroup) -> float:
    """A factorisation, and the push of every column onto all later ones."""
    width = len(group.gram)
    return width**3 + width**2 * sum(len(linear.weight) for linear in group.linears)
