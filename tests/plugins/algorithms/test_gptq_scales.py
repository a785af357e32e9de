"""Scales that GPTQ chooses on its way, against the recursion in double precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qplug import Block, InputGroup, Linear, QuantizedWeight, preset
from qplug.api.groups import dequantize
from qplug.numerics import global_scale_of, minmax_scale, search_clip, stored_candidates
from qplug_gptq.choosing import order_of_columns
from qplug_gptq.gptq import GPTQ, Params

MakeInputs = Callable[..., Tensor]
MakeLinear = Callable[..., Linear]
MakeGroup = Callable[..., InputGroup]

NVFP4 = preset("NVFP4A16").weights
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
SIZE = 16


def made_by(group: InputGroup, **options: object) -> dict[str, QuantizedWeight]:
    block = Block("block", group.linears, (group,))
    return dict(GPTQ(Params(**{"damp": 0.05, **options})).quantize(block))  # type: ignore[arg-type]


def upper_factor(gram: Tensor, order: Tensor, damp: float) -> Tensor:
    h = gram.double().clone()
    h += damp * h.diagonal().mean() * torch.eye(len(h))
    return torch.linalg.cholesky(torch.linalg.inv(h[order][:, order])).T


def rounded(column: Tensor, scale: Tensor) -> Tensor:
    sizes = (column.abs() / scale)[:, None]
    return GRID[(sizes - GRID).abs().argmin(1)] * scale * column.sign()


def losses(part: Tensor, scale: Tensor, tile: Tensor) -> Tensor:
    """The loss of each row of ``part: [out, size]`` that is rounded under ``scale: [out]``."""
    part, total = part.clone(), torch.zeros(len(part), dtype=torch.float64)
    for turn in range(part.shape[1]):
        error = (part[:, turn] - rounded(part[:, turn], scale)) / tile[turn, turn]
        total += error.square()
        part[:, turn + 1 :] -= error[:, None] * tile[turn, turn + 1 :]
    return total


def check(linear: Linear, made: QuantizedWeight, gram: Tensor, order: Tensor, damp: float) -> None:
    """Each scale is the best where the codes before it have left the weights, within rounding."""
    upper, weight = upper_factor(gram, order, damp), linear.weight.double().clone()[:, order]
    values, unit = dequantize(made).double()[:, order], global_scale_of(linear)
    for first in range(0, len(order), SIZE):
        last = first + SIZE
        tile = upper[first:last, first:last]
        part = weight[:, first:last]
        scale = made.scale[:, order[first] // SIZE].double()
        peaks = part.abs().amax(1).float()
        candidates = [each.double() for each in stored_candidates(peaks, made.args, unit)]
        least = torch.stack([losses(part, each, tile) for each in candidates]).amin(0)
        found = losses(part, scale, tile)
        assert (found > least * 1.001 + 1e-12).sum() <= 0.05 * len(found) + 1
        for turn in range(first, last):
            column = weight[:, turn]
            off = (values[:, turn] - rounded(column, scale)).abs()
            assert (off > 1e-9).float().mean() <= 0.05 + 1 / len(off)  # at ties alone
            error = (column - values[:, turn]) / upper[turn, turn]
            weight[:, turn + 1 :] -= error[:, None] * upper[turn, turn + 1 :]


@settings(max_examples=12)
@given(
    st.integers(1, 24),
    st.integers(1, 4),
    st.integers(8, 200),
    st.booleans(),
    st.sampled_from([1, 32, 40, 128]),
    st.integers(0, 2**20),
)
def test_each_scale_is_the_best_when_its_turn_comes(
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
    make_group: MakeGroup,
    rows: int,
    groups: int,
    tokens: int,
    act_order: bool,
    block_size: int,
    seed: int,
) -> None:
    width = groups * SIZE
    linear = make_linear(rows, width, NVFP4, seed=seed)
    group = make_group(make_inputs(tokens, width, seed), linear)
    made = made_by(group, act_order=act_order, block_size=block_size)["linear"]
    assert made.scale.shape == (rows, groups)
    order = torch.arange(width)
    if act_order:
        order = order_of_columns(group.gram.diagonal()[None], SIZE)[0]
    check(linear, made, group.gram, order, 0.05)


def test_columns_of_a_group_stay_together() -> None:
    diagonal = torch.tensor([[1.0, 2, 9, 0, 3, 3, 5, 4]])
    assert order_of_columns(diagonal, 2).tolist() == [[2, 3, 6, 7, 4, 5, 1, 0]]
    assert order_of_columns(diagonal, 1).tolist() == [[2, 6, 7, 4, 5, 1, 0, 3]]
    assert order_of_columns(diagonal, 8).tolist() == [[2, 6, 7, 4, 5, 1, 0, 3]]


def test_the_output_is_closer_than_with_scales_that_were_chosen_before(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    x, linear = make_inputs(600, 256), make_linear(96, 256, NVFP4)
    group = make_group(x, linear)

    def error(chosen: Linear) -> float:
        made = made_by(make_group(x, chosen))["linear"]
        off = dequantize(made) - linear.weight
        return float(((off @ group.gram) * off).sum())

    covering = replace(linear, scale=minmax_scale(linear.weight, NVFP4)[0])
    by_gram = replace(linear)
    search_clip(by_gram, group.gram, steps=20, smallest=0.6)
    on_the_way = error(replace(linear))
    assert on_the_way < 0.95 * error(by_gram)
    assert on_the_way < 0.85 * error(covering)


def test_linears_side_by_side_and_the_flag(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    x = make_inputs(200, 64)
    linears = [make_linear(24, 64, NVFP4, name=f"l{n}", seed=n) for n in range(3)]
    linears[1].weight *= 40  # another scale of the tensor
    together = made_by(make_group(x, *linears))
    for linear in linears:
        alone = made_by(make_group(x, linear))[linear.name]
        assert torch.equal(alone.scale, together[linear.name].scale)
        assert torch.equal(alone.codes.float(), together[linear.name].codes.float())
        plain = made_by(make_group(x, linear), clip=False)[linear.name]
        assert torch.equal(plain.scale, minmax_scale(linear.weight, NVFP4)[0])


@pytest.mark.parametrize("dead", [0, 5])
def test_columns_without_inputs_and_rows_of_zeros(
    dead: int, make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    x, linear = make_inputs(100, 48), make_linear(8, 48, NVFP4)
    x[:, dead * 3 : dead * 3 + 16] = 0
    linear.weight[2] = 0
    made = made_by(make_group(x, linear))["linear"]
    assert torch.isfinite(made.scale).all()
    assert (made.scale > 0).all()
    assert not dequantize(made)[2].any()
    assert (dequantize(made) - linear.weight).norm() < 0.3 * linear.weight.norm()
