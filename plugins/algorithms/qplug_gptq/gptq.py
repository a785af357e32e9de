"""GPTQ (Frantar et al., arXiv 2210.17323), on the Gram matrices of input groups.

Linears that read one tensor share its Gram matrix, so they are solved with one factorisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import torch
from torch import Tensor

from qplug import Algorithm, Block, InputGroup, Linear, Param, QuantizedWeight
from qplug.numerics import (
    closest,
    completed_experts,
    completed_gram,
    global_scale_of,
    nearest,
    parts_side_by_side,
    range_scale,
    scale_of,
    search_clips,
    together,
    unclipped_ratio,
    weight_range,
)
from qplug_gptq.choosing import order_of_columns, solve_choosing
from qplug_gptq.solver import corrected, factored, inverse_factor, solve

#: Values of a weight that is solved together with others, at most: a GPU waits for launches of
#: small ones.
_JOINED = {"cuda": 1 << 27}


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
    clip_steps: Annotated[
        int, Param("Steps of the clip search; NVFP4 has 8 at most, MXFP4 2.", 1)
    ] = 20
    clip_smallest: Annotated[
        float, Param("The smallest range, of the full one; not for NVFP4 and MXFP4.", 0.05, 1)
    ] = 0.6
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
    effort = "solves"

    @property
    def by_group(self) -> bool:
        return not self.params.true_sequential

    @property
    def needs_drift(self) -> bool:
        return self.params.correct > 0

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        codes: dict[str, QuantizedWeight] = {}
        in_order = [[*same] for _, same in groupby(block.groups, lambda g: g.experts or id(g))]
        for groups in in_order if self.params.true_sequential else [block.groups]:
            if codes:
                block.use_codes(codes)
            units = [*parts_side_by_side(groups, block.processes)]
            for solved in block.spread(units, self._solve, cost=lambda unit: _cost(unit[0])):
                codes.update(solved.codes)
                block.notes.extend(solved.notes)
        for linear in block.linears:
            if linear.name not in codes:  # it is in no input group
                codes[linear.name] = self._rounded(linear)
                block.notes.append(f"{linear.name}: no token reached it; rounded to nearest")
        if self.params.prior:
            noted = (note for note in completed_experts(block.groups) if note not in block.notes)
            block.notes.extend([*noted])  # AWQ may have
        return codes

    def _solve(self, unit: tuple[list[InputGroup], InputGroup]) -> _Solved:
        """Solves groups that are alike, which are parts of a group."""
        groups, whole = unit
        params = self.params
        gram = completed_gram(groups, whole, params.prior)
        if not groups[0].tokens and not gram.any():  # experts of which nothing is known
            every = (linear for group in groups for linear in group.linears)
            return _Solved({linear.name: self._rounded(linear) for linear in every}, [])
        width = gram.shape[1]
        order = torch.arange(width, device=gram.device).expand(len(groups), width)
        on_the_way = self._chooses_on_the_way(groups[0])
        if params.act_order:
            diagonal = gram.diagonal(dim1=1, dim2=2)
            size = groups[0].linears[0].args.group_size if on_the_way else None
            order = order_of_columns(diagonal, size or 1)
        drifts = [g.drift for g in groups if g.drift is not None] if params.correct else []
        sets = [[*linears] for linears in zip(*(group.linears for group in groups), strict=True)]
        scaled: list[_Scaled] = []
        if not drifts and not on_the_way:
            # Before the factor, which may take the memory of the Gram matrix.
            scaled = [self._scaled(linears, _weights(linears), gram) for linears in sets]
        factoring = (
            nullcontext(inverse_factor(gram, order, params.damp))
            if drifts
            else factored(gram, order, params.damp)
        )
        codes: dict[str, QuantizedWeight] = {}
        with factoring as (factor, dampings):
            for run in _at_once(scaled):
                codes |= self._codes(run, factor, order)
            for linears in sets if not scaled else ():
                weight = _weights(linears)
                if drifts:
                    weight = corrected(weight, together(drifts), factor, order, params.correct)
                if on_the_way:
                    codes |= self._choosing(linears, weight, factor, order)
                else:
                    codes |= self._codes([self._scaled(linears, weight, gram)], factor, order)
        notes = []
        for group, damp in zip(groups, dampings, strict=True):
            if damp > params.damp:
                names = ", ".join(linear.name for linear in group.linears)
                notes.append(f"{names}: damping was raised from {params.damp:g} to {damp:g}")
        return _Solved(codes, notes)

    def _codes(
        self, run: Sequence[_Scaled], factor: Tensor, order: Tensor
    ) -> dict[str, QuantizedWeight]:
        """The codes of linears that are solved as one, one below the other."""
        scales, zeros = [each.scale for each in run], [each.zero for each in run]
        solution = solve(
            _below([each.weight for each in run]),
            _below(scales),
            _below([zero for zero in zeros if zero is not None]) if zeros[0] is not None else None,
            run[0].linears[0].args,
            factor,
            order,
            self.params.block_size,
        )
        codes: dict[str, QuantizedWeight] = {}
        rows = [each.weight.shape[1] for each in run]
        for each, own in zip(run, solution.split(rows, dim=1), strict=True):
            codes |= _by_name(each.linears, own, each.scale, each.zero)
        return codes

    def _choosing(
        self, linears: Sequence[Linear], weight: Tensor, factor: Tensor, order: Tensor
    ) -> dict[str, QuantizedWeight]:
        """The codes of ``linears``, whose scales are chosen column by column."""
        units = torch.stack([unit for unit in map(global_scale_of, linears) if unit is not None])
        size, trials = self.params.block_size, self.params.clip_steps + 1
        solution, scale = solve_choosing(
            weight, units, linears[0].args, factor, order, size, trials
        )
        return _by_name(linears, solution, scale, None)

    def _rounded(self, linear: Linear) -> QuantizedWeight:
        """The nearest codes of ``linear``, whose inputs are not known."""
        return closest(linear) if self.params.clip else nearest(linear)

    def _chooses_on_the_way(self, group: InputGroup) -> bool:
        """Whether scales are chosen column by column, for all linears of ``group`` alike.

        Measured (benchmarks/RESULTS.md): the finer the steps of scales, the more that wins; powers
        of two are chosen before, and columns keep the order that is best for their codes.
        """
        return self.params.clip and all(
            linear.args.two_level and linear.args.bits < 8 and linear.scale is None
            for linear in group.linears
        )

    def _scaled(self, linears: Sequence[Linear], weight: Tensor, gram: Tensor) -> _Scaled:
        return _Scaled(linears, weight, *self._scale(linears, weight, gram))

    def _scale(
        self, linears: Sequence[Linear], weight: Tensor, gram: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The scales chosen for ``linears``, or else scales for ``weight``, which is corrected.

        ``weight: [n, out, in]``, ``gram: [n, in, in]``; the results have a leading axis, too.
        """
        params, args = self.params, linears[0].args
        if linears[0].scale is not None:
            return _stacked([scale_of(linear) for linear in linears])
        if params.clip and args.bits < 8:
            trials = [
                Linear(linear.name, own, args, global_scale=linear.global_scale)
                for linear, own in zip(linears, weight, strict=True)
            ]
            search_clips(trials, gram, steps=params.clip_steps, smallest=params.clip_smallest)
            return _stacked([scale_of(trial) for trial in trials])
        # Do not clip: GPTQ compensates rounding errors, but not clipping errors.
        ratio = unclipped_ratio(args)
        found = []
        for linear, own in zip(linears, weight, strict=True):
            low, high = weight_range(own, args)
            found.append(range_scale(low * ratio, high * ratio, args, linear.global_scale))
        return _stacked(found)


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A linear of each of the groups that are alike, with its ``weight: [n, out, in]`` and grid.

    ``scale`` and ``zero``: ``[n, *scale_shape]``.
    """

    linears: Sequence[Linear]
    weight: Tensor
    scale: Tensor
    zero: Tensor | None


def _at_once(scaled: Sequence[_Scaled]) -> Iterator[list[_Scaled]]:
    """Yields ``scaled`` in lists that are solved as one, if there is one grid for all of a list.

    Rows must have scales of their own.
    """

    def kind(each: _Scaled) -> object:
        args, weight = each.linears[0].args, each.weight
        is_small = weight.numel() <= _JOINED.get(weight.device.type, 0)
        return args if is_small and args.strategy in ("group", "channel") else id(each)

    for _, alike in groupby(scaled, kind):
        yield [*alike]


def _below(tensors: Sequence[Tensor]) -> Tensor:
    """``tensors``, ``[n, rows, columns]``, one below the other."""
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors], dim=1)


def _weights(linears: Sequence[Linear]) -> Tensor:
    """The weights of ``linears``, one of each of the groups that are alike: ``[n, out, in]``."""
    return together([linear.weight for linear in linears])


def _by_name(
    linears: Sequence[Linear], codes: Tensor, scale: Tensor, zero: Tensor | None
) -> dict[str, QuantizedWeight]:
    """What ``linears`` become, by name; the tensors have a leading axis for them."""
    return {
        linear.name: QuantizedWeight(own, step, None if zero is None else zero[number], linear.args)
        for number, (linear, own, step) in enumerate(zip(linears, codes, scale, strict=True))
    }


def _stacked(found: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of several linears, each as one tensor."""
    zeros = [zero for _, zero in found if zero is not None]
    return together([scale for scale, _ in found]), together(zeros) if zeros else None


@dataclass(frozen=True)
class _Solved:
    """The result for input groups: codes by linear, and notes for the user."""

    codes: dict[str, QuantizedWeight]
    notes: list[str]


def _cost(groups: Sequence[InputGroup]) -> float:
    """The cost of a factorisation, and of pushing every column's error onto all later ones."""
    width, linears = groups[0].width, groups[0].linears
    return len(groups) * (width**3 + width**2 * sum(len(linear.weight) for linear in linears))
