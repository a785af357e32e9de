"""GPTQ against the textbook: double precision, an explicit inverse, one column after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qplug import Block, InputGroup, Linear, QplugError, QuantArgs, QuantizedWeight
from qplug.api.groups import dequantize
from qplug.numerics.rounding import nearest
from qplug_gptq import gptq, solver
from qplug_gptq.gptq import GPTQ, Params

MakeInputs = Callable[..., Tensor]
MakeLinear = Callable[..., Linear]
MakeGroup = Callable[..., InputGroup]

GRIDS = {
    "int4 groups": QuantArgs("int4", "group", 16),
    "int4 groups, asymmetric": QuantArgs("int4", "group", 16, symmetric=False),
    "int4 groups, bfloat16 scales": QuantArgs("int4", "group", 32, scale_dtype="bfloat16"),
    "int4 channels": QuantArgs("int4", "channel"),
    "int4 channels, asymmetric": QuantArgs("int4", "channel", symmetric=False),
    "int3 groups": QuantArgs("int3", "group", 32),
    "int8 channels": QuantArgs("int8", "channel"),
    "int8 tensor": QuantArgs("int8", "tensor"),
    "e4m3 channels": QuantArgs("e4m3", "channel"),
    "e4m3 blocks": QuantArgs("e4m3", "block", block=(20, 24)),
    "e5m2 channels": QuantArgs("e5m2", "channel"),
    "e2m1 groups": QuantArgs("e2m1", "group", 16),
    "e3m2 groups": QuantArgs("e3m2", "group", 32),
    "e3m4 channels": QuantArgs("e3m4", "channel"),
}
every_grid = pytest.mark.parametrize("grid", GRIDS)

#: How far from the middle of two codes a weight may be that float32 rounds to the one and double
#: precision to the other: a part of their distance, and what float32 loses at the end of the grid.
TIE, LOST = 1e-4, 2.0**-21


# --- the textbook ---------------------------------------------------------------------------------


@dataclass
class Textbook:
    """Codes ``[out, in]``, and each weight when its turn came, by its scale."""

    codes: Tensor
    quotients: Tensor
    order: Tensor


def grid_values(args: QuantArgs) -> Tensor:
    native = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(args.dtype)
    if native is not None:
        every = torch.arange(256, dtype=torch.uint8).view(native).double()
        return every[every.isfinite()].unique()
    if args.is_float:  # every code of the others is a number
        e, m = int(args.dtype[1]), int(args.dtype[3])
        fractions, bias = torch.arange(2**m) / 2**m, 2 ** (e - 1) - 1
        parts = [fractions * 2.0 ** (1 - bias)]
        parts += [(1 + fractions) * 2.0 ** (k - bias) for k in range(1, 2**e)]
        every = torch.cat(parts).double()
        return torch.cat([every, -every]).unique()
    low, high = args.code_range
    return torch.arange(low, high + 1).double()


def spread(values: Tensor, args: QuantArgs, shape: torch.Size) -> Tensor:
    """A scale or a zero point for each weight."""
    tall, wide = {
        "tensor": tuple(shape),
        "channel": (1, shape[1]),
        "group": (1, args.group_size),
        "block": args.block,
    }[args.strategy]
    rows = torch.arange(shape[0]) // tall
    columns = torch.arange(shape[1]) // wide
    return values.double()[rows][:, columns]


def textbook(
    linear: Linear,
    gram: Tensor,
    made: QuantizedWeight,
    *,
    damp: float = 0.01,
    act_order: bool = True,
) -> Textbook:
    """Algorithm 1 of the paper, under the scales that ``made`` has."""
    args, weight = linear.args, linear.weight.double().clone()
    scale = spread(made.scale, args, weight.shape)
    zero = torch.zeros_like(scale) if made.zero is None else spread(made.zero, args, weight.shape)
    grid = grid_values(args)
    h = gram.double().clone()
    diagonal = h.diagonal().clone()
    order = torch.arange(len(h))
    if act_order:
        order = torch.sort(diagonal, descending=True, stable=True).indices
    h += damp * diagonal.mean() * torch.eye(len(h))
    for dead in (diagonal == 0).nonzero().flatten():
        h[dead, dead] = 1
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order])).T
    codes, quotients = torch.empty_like(weight), torch.empty_like(weight)
    for turn, column in enumerate(order):
        wanted = weight[:, column] / scale[:, column] + zero[:, column]
        codes[:, column] = grid[(wanted[:, None] - grid).abs().argmin(1)]
        quotients[:, column] = wanted
        rounded = (codes[:, column] - zero[:, column]) * scale[:, column]
        error = (weight[:, column] - rounded) / upper[turn, turn]
        later = order[turn + 1 :]
        weight[:, later] -= error[:, None] * upper[turn, turn + 1 :]
    return Textbook(codes, quotients, order)


def check_codes(found: QuantizedWeight, wanted: Textbook, *, rows: float, tie: float = TIE) -> None:
    """The same codes, but for ties: each row that differs begins to at a tie.

    A code that differs moves all that come after it in its row. ``rows``: how many of them may.
    """
    codes = found.codes.double()
    differs = codes != wanted.codes
    assert differs.any(1).sum() <= rows * len(codes)
    for row in differs.any(1).nonzero().flatten():
        turn = differs[row][wanted.order].nonzero()[0]
        column = wanted.order[turn]
        one, other = codes[row, column], wanted.codes[row, column]
        middle, apart = (one + other) / 2, (one - other).abs()
        lost = LOST * grid_values(found.args).max()
        assert (wanted.quotients[row, column] - middle).abs() <= tie * apart + lost


def output_error(linear: Linear, found: QuantizedWeight, gram: Tensor) -> float:
    """``tr(D G Dᵀ)``: the sum over tokens of the squared error of the output."""
    off = (dequantize(found) - linear.weight).double()
    return float(((off @ gram.double()) * off).sum())


def quantized(group: InputGroup, **options: Any) -> tuple[Block, dict[str, QuantizedWeight]]:
    block = Block("block", group.linears, (group,))
    return block, dict(GPTQ(Params(**{"damp": 0.01, **options})).quantize(block))


# --- the same codes -------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("damp", [0.01, 0.3])
@every_grid
def test_codes_are_those_of_the_textbook(
    grid: str,
    damp: float,
    act_order: bool,
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
    make_group: MakeGroup,
) -> None:
    x, linear = make_inputs(400, 96), make_linear(70, 96, GRIDS[grid])
    before = linear.weight.clone()
    group = make_group(x, linear)
    gram = group.gram.clone()
    block, made = quantized(group, damp=damp, act_order=act_order)
    assert torch.equal(linear.weight, before)
    assert torch.equal(group.gram, gram)
    assert block.notes == []
    found = made["linear"]
    assert found.args == GRIDS[grid]
    assert found.codes.shape == (70, 96)
    assert found.scale.shape == GRIDS[grid].scale_shape((70, 96))
    check_codes(found, textbook(linear, gram, found, damp=damp, act_order=act_order), rows=0.03)
    # And they are not simply the nearest, nor those of another order.
    linear.scale, linear.zero = found.scale, found.zero
    assert (found.codes.float() != nearest(linear).codes.float()).float().mean() > 0.05
    with pytest.raises(AssertionError):
        check_codes(
            found, textbook(linear, gram, found, damp=damp, act_order=not act_order), rows=0.03
        )


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(GRIDS)),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from([1, 5, 33, 128]),
    st.integers(0, 2**20),
)
def test_any_shape(
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
    make_group: MakeGroup,
    grid: str,
    rows: int,
    groups: int,
    tokens: int,
    act_order: bool,
    block_size: int,
    seed: int,
) -> None:
    args = GRIDS[grid]
    width = groups * (args.group_size or 11)
    x, linear = make_inputs(tokens, width, seed), make_linear(rows, width, args, seed=seed)
    group = make_group(x, linear)
    _, made = quantized(group, damp=0.05, act_order=act_order, block_size=block_size)
    wanted = textbook(linear, group.gram, made["linear"], damp=0.05, act_order=act_order)
    check_codes(made["linear"], wanted, rows=max(0.1, 1 / rows), tie=10 * TIE)


@every_grid
def test_blocks_of_any_size_give_the_same_codes(
    grid: str, make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    x = make_inputs(300, 96)
    for size in (1, 7, 32, 95, 96, 1000):
        linear = make_linear(40, 96, GRIDS[grid])
        group = make_group(x, linear)
        _, made = quantized(group, block_size=size)
        wanted = textbook(linear, group.gram, made["linear"])
        check_codes(made["linear"], wanted, rows=0.05)


@every_grid
@pytest.mark.parametrize("joined", [0, 64 * 96], ids=["apart", "joined"])
def test_linears_of_a_group_are_solved_as_each_alone(
    grid: str,
    joined: int,
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
    make_group: MakeGroup,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Queries, keys and values read one tensor, and differ in height."""
    x, args = make_inputs(300, 96), GRIDS[grid]
    monkeypatch.setattr(gptq, "_JOINED", {"cpu": joined})
    solved: list[int] = []

    def counted(weight: Tensor, *others: Any) -> Tensor:
        solved.append(weight.shape[1])
        return solver.solve(weight, *others)

    monkeypatch.setattr(gptq, "solve", counted)

    def linears() -> list[Linear]:
        return [
            make_linear(r, 96, args, name=n, seed=r)
            for n, r in zip("qkv", (64, 20, 21), strict=True)
        ]

    _, together = quantized(make_group(x, *linears()))
    assert list(together) == ["q", "k", "v"]
    is_one = joined and args.strategy in ("group", "channel")
    assert solved == ([105] if is_one else [64, 20, 21])
    for linear in linears():
        _, alone = quantized(make_group(x, linear))
        assert torch.equal(alone[linear.name].codes.float(), together[linear.name].codes.float())
        assert torch.equal(alone[linear.name].scale, together[linear.name].scale)


# --- the error ------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize("act_order", [True, False])
def test_the_output_is_never_further_off_than_with_nearest_codes(
    grid: str,
    act_order: bool,
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
    make_group: MakeGroup,
) -> None:
    for seed in range(8):
        tokens = (40, 100, 400)[seed % 3]
        linear = make_linear(48, 96, GRIDS[grid], seed=seed)
        group = make_group(make_inputs(tokens, 96, seed), linear)
        plain = output_error(linear, nearest(linear), group.gram)
        _, made = quantized(group, act_order=act_order)
        assert output_error(linear, made["linear"], group.gram) < plain
        # Also not with nearest codes under the scales that it took.
        linear.scale, linear.zero = made["linear"].scale, made["linear"].zero
        nearby = output_error(linear, nearest(linear), group.gram)
        assert output_error(linear, made["linear"], group.gram) < nearby


def test_inputs_that_have_nothing_to_do_with_each_other_leave_nearest_codes(
    make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    linear = make_linear(32, 48, GRIDS["int4 groups"])
    group = make_group(torch.eye(48) * torch.linspace(1, 5, 48), linear)
    _, made = quantized(group)
    linear.scale = made["linear"].scale
    assert torch.equal(made["linear"].codes, nearest(linear).codes)


@pytest.mark.parametrize(
    "args",
    [
        QuantArgs("e2m1", "group", 16),
        QuantArgs("e3m2", "channel"),
        QuantArgs("e5m2", "channel"),
        QuantArgs("e4m2", "channel"),
        QuantArgs("e4m3", "channel", use_qtorch=True),
    ],
    ids=lambda args: f"{args.dtype}{', qtorch' * args.use_qtorch}",
)
def test_the_kernel_of_gpus_is_left_out_for_grids_that_it_has_not(args: QuantArgs) -> None:
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    assert solver.rounder(on_gpu, args, 128) is solver.round_columns


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["int4 groups", "int4 groups, asymmetric", "e4m3 channels"])
def test_scales_that_were_chosen_before_are_kept(
    grid: str, make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    linear = make_linear(32, 96, GRIDS[grid])
    chosen = nearest(linear)
    linear.scale, linear.zero = chosen.scale * 0.75, chosen.zero
    group = make_group(make_inputs(200, 96), linear)
    for clip in (False, True):  # that they are clipped already is known
        _, made = quantized(group, clip=clip)
        assert torch.equal(made["linear"].scale, chosen.scale * 0.75)
        if chosen.zero is not None:
            assert torch.equal(made["linear"].zero, chosen.zero)
        check_codes(
            made["linear"],
            textbook(linear, group.gram, made["linear"]),
            rows=0.05,
        )


@every_grid
def test_scales_of_its_own_clip_nothing(
    grid: str, make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    args, linear = GRIDS[grid], make_linear(32, 96, GRIDS[grid])
    _, made = quantized(make_group(make_inputs(200, 96), linear), clip=False)
    found = made["linear"]
    scale = spread(found.scale, args, linear.weight.shape)
    wanted = linear.weight.double() / scale
    if found.zero is not None:
        wanted = wanted + spread(found.zero, args, linear.weight.shape)
    grid_ends = grid_values(args)[[0, -1]]
    ulp = 2.0**-8 if args.scale_dtype == "bfloat16" else 2.0**-22
    reach = grid_ends.abs().max() * ulp + (0.5 if found.zero is not None else 0)
    assert (wanted >= grid_ends[0] - reach).all()
    assert (wanted <= grid_ends[1] + reach).all()
    # Nor is any range wider than it must be: in each, a weight is at one of the ends.
    near = torch.minimum((wanted - grid_ends[0]).abs(), (wanted - grid_ends[1]).abs())
    if args.symmetric and not args.is_float:
        near = (wanted.abs() - grid_ends[1]).abs()
    cells = spread(torch.arange(found.scale.numel()).view(found.scale.shape), args, near.shape)
    for cell in range(found.scale.numel()):
        assert near[cells == cell].min() <= reach


@pytest.mark.parametrize(
    "grid", ["int3 groups", "int4 channels", "int4 groups, asymmetric", "e2m1 groups"]
)
def test_clips_are_searched_where_asked_for(
    grid: str, make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    x = make_inputs(200, 96)
    errors, scales = [], []
    for clip in (False, True):
        linear = make_linear(32, 96, GRIDS[grid])
        group = make_group(x, linear)
        _, made = quantized(group, clip=clip)
        errors.append(output_error(linear, made["linear"], group.gram))
        scales.append(made["linear"].scale)
    assert (scales[1] < scales[0]).any()
    assert errors[1] < errors[0]


# --- what is degenerate ---------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", ["int4 channels", "int4 groups, asymmetric", "e4m3 channels"])
def test_columns_that_no_token_excites(
    grid: str,
    act_order: bool,
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
    make_group: MakeGroup,
) -> None:
    """They are rounded to nearest, and the others as if they were not there."""
    x, linear = make_inputs(300, 96), make_linear(40, 96, GRIDS[grid])
    dead = torch.tensor([0, 3, 40, 41, 95])
    alive = torch.tensor([c for c in range(96) if c not in dead])
    x[:, dead] = 0
    group = make_group(x, linear)
    block, made = quantized(group, act_order=act_order)
    assert block.notes == []
    found = made["linear"]
    linear.scale, linear.zero = found.scale, found.zero
    assert torch.equal(found.codes.float()[:, dead], nearest(linear).codes.float()[:, dead])
    wanted = textbook(linear, group.gram, found, act_order=act_order)
    check_codes(found, wanted, rows=0.05)
    # Without them, and with the damping that was: a part of a mean in which dead columns count.
    args = linear.args
    scale = spread(found.scale, args, linear.weight.shape)[:, alive].float()
    zero = None if found.zero is None else spread(found.zero, args, linear.weight.shape)[:, alive]
    fewer = Linear(
        "linear",
        linear.weight[:, alive],
        QuantArgs(args.dtype, "group", 1, symmetric=args.symmetric),
        scale=scale,
        zero=None if zero is None else zero.to(torch.uint8),
    )
    _, without = quantized(
        make_group(x[:, alive], fewer), damp=0.01 * len(alive) / 96, act_order=act_order
    )
    same = without["linear"].codes.float() == found.codes.float()[:, alive]
    assert same.all(1).float().mean() > 0.95


def test_columns_that_no_token_excites_need_no_damping(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    x, linear = make_inputs(300, 96), make_linear(40, 96, GRIDS["int4 channels"])
    x[:, [0, 3, 40, 41, 95]] = 0
    group = make_group(x, linear)
    block, made = quantized(group, damp=0.0)
    assert block.notes == []
    check_codes(made["linear"], textbook(linear, group.gram, made["linear"], damp=0.0), rows=0.05)


def test_inputs_that_are_all_zero(make_linear: MakeLinear, make_group: MakeGroup) -> None:
    linear = make_linear(8, 32, GRIDS["int4 groups"])
    block, made = quantized(make_group(torch.zeros(5, 32), linear))
    linear.scale = made["linear"].scale
    assert torch.equal(made["linear"].codes, nearest(linear).codes)
    assert block.notes == []


@pytest.mark.parametrize("damp", [0.01, 0.001])
def test_inputs_that_never_change(
    damp: float, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    """One direction only: its error can be made nearly nothing."""
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(100, 64)
    linear = make_linear(16, 64, GRIDS["int4 groups"])
    group = make_group(x.contiguous(), linear)
    plain = output_error(linear, nearest(linear), group.gram)
    _, made = quantized(group, damp=damp)
    assert output_error(linear, made["linear"], group.gram) < 0.05 * plain


def test_rows_of_zeros(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    for args in GRIDS.values():
        linear = make_linear(40, 96, args)
        linear.weight[::2] = 0
        _, made = quantized(make_group(make_inputs(200, 96), linear))
        values = dequantize(made["linear"])
        assert (values[::2] == 0).all()
        assert (values[1::2] != 0).any(1).all()
        assert torch.isfinite(made["linear"].scale).all()


# --- damping --------------------------------------------------------------------------------------


def test_damping_is_raised_and_noted(make_linear: MakeLinear, make_group: MakeGroup) -> None:
    """Columns that are the same cannot be told apart, but with damping."""
    x = torch.ones(10, 32)
    names = ("gate", "up")
    linears = [make_linear(8, 32, GRIDS["int4 groups"], name=name) for name in names]
    group = make_group(x, *linears)
    block, made = quantized(group, damp=0.0)
    assert block.notes == ["gate, up: damping was raised from 0 to 0.0001"]
    for linear in linears:
        wanted = textbook(linear, group.gram, made[linear.name], damp=0.0001, act_order=True)
        check_codes(made[linear.name], wanted, rows=0.2, tie=0.1)
    block, _ = quantized(make_group(x, *linears), damp=0.0001)
    assert block.notes == []


def test_damping_is_raised_tenfold_until_it_helps(
    make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    linear = make_linear(8, 2, QuantArgs("int4", "channel"))
    group = make_group(torch.eye(2), linear)
    group.gram = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # rounding can make as bad a matrix
    block, made = quantized(group, damp=0.01)
    assert block.notes == ["linear: damping was raised from 0.01 to 1"]
    check_codes(
        made["linear"],
        textbook(linear, group.gram, made["linear"], damp=1.0, act_order=True),
        rows=0,
    )


def test_statistics_that_no_damping_mends(make_linear: MakeLinear, make_group: MakeGroup) -> None:
    linear = make_linear(8, 2, QuantArgs("int4", "channel"))
    group = make_group(torch.eye(2), linear)
    group.gram = torch.tensor([[1.0, 50.0], [50.0, 1.0]])
    with pytest.raises(QplugError, match="cannot be factored: too few calibration tokens"):
        quantized(group)
    group.gram = torch.tensor([[1.0, float("nan")], [float("nan"), float("nan")]])
    with pytest.raises(QplugError, match="the inputs of this layer are not finite"):
        quantized(group)


# --- experts that see few tokens ------------------------------------------------------------------


def fresh_error(
    make_linear: MakeLinear, whole: Callable[[Linear], InputGroup], fresh: Tensor, **options: Any
) -> float:
    """The squared error on ``fresh`` tokens of a rare expert's linear, over four weights."""
    total = 0.0
    for seed in range(4):
        linear = make_linear(48, 96, GRIDS["int4 groups"], name="mlp.experts.0.up", seed=seed)
        _, made = quantized(whole(linear), damp=0.05, **options)
        total += output_error(linear, made[linear.name], fresh.T @ fresh)
    return total


def rare(make_group: MakeGroup, x: Tensor, linear: Linear) -> InputGroup:
    """A group with the tokens ``x``, of which there may be none."""
    group = make_group(x if len(x) else torch.zeros(1, x.shape[1]), linear)
    group.tokens = len(x)
    return group


@pytest.mark.parametrize("tokens", [0, 4, 24, 96, 300])
def test_the_layer_helps_an_expert_on_tokens_that_it_has_not_seen(
    tokens: int, make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    x = make_inputs(2000, 96)

    def whole(linear: Linear) -> InputGroup:
        other = make_linear(8, 96, GRIDS["int4 groups"], name="mlp.experts.1.up")
        parts = (rare(make_group, x[:tokens], linear), make_group(x[tokens:1000], other))
        return replace(make_group(x[:1000], linear, other), by_expert=parts)

    alone = fresh_error(make_linear, whole, x[1000:], prior=0.0)
    completed = fresh_error(make_linear, whole, x[1000:])
    assert completed < (0.9 if tokens < 300 else 1) * alone


@pytest.mark.parametrize("tokens", [0, 4, 24])
def test_an_experts_last_linear_is_helped_where_tokens_are_few(
    tokens: int, make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    """With more tokens than channels it depends on how channels correlate; here they do much."""
    x = make_inputs(2000, 96)

    def whole(linear: Linear) -> InputGroup:
        return replace(rare(make_group, x[:tokens], linear), experts="mlp.experts")

    alone = fresh_error(make_linear, whole, x[1000:], prior=0.0)
    assert fresh_error(make_linear, whole, x[1000:]) < 0.95 * alone


def test_completed_experts_are_noted_once(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    linear = make_linear(8, 96, GRIDS["int4 groups"], name="mlp.experts.7.down")
    group = replace(make_group(make_inputs(5, 96), linear), experts="mlp.experts")
    block = Block("block", (linear,), (group,))
    for prior, count in ((0.0, 0), (2.0, 1), (2.0, 1)):
        GPTQ(Params(prior=prior)).quantize(block)
        assert len(block.notes) == count
    assert "complete" in block.notes[0]


def test_completed_experts_are_solved_as_the_textbook_does(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    x = make_inputs(400, 96)
    rare, other = (make_linear(40, 96, GRIDS["int4 groups"], name=f"mlp.{e}.up") for e in (0, 1))
    parts = (make_group(x[:30], rare), make_group(x[30:], other))
    whole = replace(make_group(x, rare, other), by_expert=parts)
    made = GPTQ(Params(damp=0.01)).quantize(Block("block", (rare, other), (whole,)))
    for part, linear in zip(parts, (rare, other), strict=True):
        gram = part.gram.double() + 2 * (96 * part.tokens) ** 0.5 / 400 * (
            0.75 * whole.gram.double() + 0.25 * whole.gram.double().diagonal().diag()
        )
        check_codes(made[linear.name], textbook(linear, gram, made[linear.name]), rows=0.05)


# --- linears without statistics -------------------------------------------------------------------


def test_a_linear_that_no_token_reached(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    seen = make_linear(8, 32, GRIDS["int4 groups"], name="seen")
    unseen = make_linear(8, 32, GRIDS["int4 groups"], name="unseen", seed=1)
    group = make_group(make_inputs(50, 32), seen)
    block = Block("block", (seen, unseen), (group,))
    made = GPTQ(Params()).quantize(block)
    assert set(made) == {"seen", "unseen"}
    assert torch.equal(made["unseen"].codes, nearest(unseen).codes)
    assert block.notes == ["unseen: no token reached it; rounded to nearest"]


def test_factors_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(800, 384, generator=torch.Generator().manual_seed(0))
    threads, factors = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            factors.append(solver.inverse_factor((x.T @ x)[None], torch.arange(384)[None], 0.05)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(factor.equal(factors[0]) for factor in factors)
