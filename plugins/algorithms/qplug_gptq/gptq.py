"""GPTQ (Frantar et al., arXiv 2210.17323), on the Gram matrices of input groups.

Linears that read one tensor share its Gram matrix, so they are solved with one factorisation.
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
    completed_experts,
    completed_gram,
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
        bool, Param("Groups see the quantized outputs of the groups before them in the block.")
    ] = False
    correct: Annotated[
        float, Param("The part of the inputs' drift from the float model that is corrected.", 0, 1)
    ] = 0.0
    clip: Annotated[
        bool,
        Param("Search clips of weights of fewer than 8 bits that no earlier algorithm clipped."),
    ] = True
    clip_steps: Annotated[int, Param("Steps of the clip search.", 1)] = 20
    clip_smallest: Annotated[float, Param("The smallest range, of the full one.", 0.05, 1)] = 0.6
    prior: Annotated[
        float,
        Param(
            "Tokens of the layer that complete the statistics of an expert with n tokens, in units "
            "of sqrt(width * n); 0 adds none.",
            0,
        ),
    ] = 2.0


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
        in_order = [[*same] for _, same in groupby(block.groups, lambda g: g.experts or id(g))]
        for groups in in_order if self.params.true_sequential else [block.groups]:
            if codes:
                block.use_codes(codes)
            parts = [(part, group) for group in groups for part in group.by_tokens]
            for solved in block.spread(parts, self._solve, cost=_cost):
                codes.update(solved.codes)
                block.notes.extend(solved.notes)
        for linear in block.linears:
            if linear.name not in codes:  # it is in no input group
                codes[linear.name] = nearest(linear)
                block.notes.append(f"{linear.name}: no token reached it; rounded to nearest")
        if self.params.prior:
            noted = (note for note in completed_experts(block.groups) if note not in block.notes)
            block.notes.extend([*noted])  # AWQ may have
        return codes

    def _solve(self, pair: tuple[InputGroup, InputGroup]) -> _Solved:
        group, whole = pair
        params = self.params
        gram = completed_gram(group, whole, params.prior)
        if not group.tokens and not gram.any():  # an expert of which nothing is known
            return _Solved({linear.name: nearest(linear) for linear in group.linears}, [])
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        if not params.act_order:
            order = torch.arange(len(order), device=order.device)
        factor, damp = inverse_factor(gram, order, params.damp)
        notes = []
        if damp > params.damp:
            names = ", ".join(linear.name for linear in group.linears)
            notes.append(f"{names}: damping was raised from {params.damp:g} to {damp:g}")
        codes = {}
        for linear in group.linears:
            weight = linear.weight
            if params.correct and group.drift is not None:
                weight = corrected(weight, group.drift, factor, order, params.correct)
            scale, zero = self._scale(linear, weight, gram)
            solution = solve(weight, scale, zero, linear.args, factor, order, params.block_size)
            codes[linear.name] = QuantizedWeight(solution, scale, zero, linear.args)
        return _Solved(codes, notes)

    def _scale(self, linear: Linear, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scales chosen for ``linear``, or else scales for ``weight``, which is corrected."""
        params = self.params
        if linear.scale is not None:
            return scale_of(linear)
        if params.clip and linear.args.bits < 8:
            trial = Linear(linear.name, weight, linear.args, global_scale=linear.global_scale)
            search_clip(trial, gram, steps=params.clip_steps, smallest=params.clip_smallest)
            return scale_of(trial)
        # Do not clip: GPTQ compensates rounding errors, but not clipping errors.
        low, high = weight_range(weight, linear.args)
        ratio = unclipped_ratio(linear.args)
        return range_scale(low * ratio, high * ratio, linear.args, linear.global_scale)


@dataclass(frozen=True)
class _Solved:
    """The result for an input group: codes by linear, and notes for the user."""

    codes: dict[str, QuantizedWeight]
    notes: list[str]


def _cost(pair: tuple[InputGroup, InputGroup]) -> float:
    """The cost of a factorisation, and of pushing every column's error onto all later ones."""
    group, _ = pair
    width = len(group.gram)
    return width**3 + width**2 * sum(len(linear.weight) for linear in group.linears)
