"""AWQ against brute force: every candidate tried by forward products, on all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qplug
from qplug import Block, InputGroup, Linear, QuantArgs, QuantizedWeight, Scheme
from qplug.api.groups import dequantize
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.machine.session import Session
from qplug.numerics import completed_experts, completed_gram
from qplug.numerics.clipping import search_clip
from qplug.numerics.losses import output_error
from qplug.numerics.rounding import nearest
from qplug.reading.folder import open_folder
from qplug_awq.awq import AWQ, Params

Family = Callable[..., Path]
StartWalk = Callable[..., Walk]
MakeTokens = Callable[..., Tensor]
MakeInputs = Callable[..., Tensor]
MakeLinear = Callable[..., Linear]
MakeGroup = Callable[..., InputGroup]

GRIDS = {
    "int4 groups": QuantArgs("int4", "group", 16),
    "int4 groups, asymmetric": QuantArgs("int4", "group", 16, symmetric=False),
    "int4 groups, bfloat16 scales": QuantArgs("int4", "group", 32, scale_dtype="bfloat16"),
    "int5 groups, asymmetric, bfloat16 scales": QuantArgs(
        "int5", "group", 16, symmetric=False, scale_dtype="bfloat16"
    ),
    "int3 channels": QuantArgs("int3", "channel"),
    "int8 channels": QuantArgs("int8", "channel"),
    "int2 groups, asymmetric": QuantArgs("int2", "group", 16, symmetric=False),
    "e4m3 channels": QuantArgs("e4m3", "channel"),
    "e2m1 groups": QuantArgs("e2m1", "group", 16),
}
every_grid = pytest.mark.parametrize("grid", GRIDS)
ACTIVATIONS = {
    "int8 tokens": QuantArgs("int8", "token", dynamic=True),
    "int4 tokens": QuantArgs("int4", "token", dynamic=True),
    "e4m3 tokens": QuantArgs("e4m3", "token", dynamic=True),
    "e2m1 tokens": QuantArgs("e2m1", "token", dynamic=True),
}

#: What float32 may lose in a sum over weights and tokens.
RTOL = 1e-5


# --- brute force ----------------------------------------------------------------------------------
#
# Rounding is in float32, as everywhere: the largest weight of a symmetric group lies in the middle
# of two codes, and the last bit decides. What is made of rounded weights is in double precision.


def float_grid(dtype: str) -> Tensor:
    if dtype == "e2m1":
        return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6]).unique()
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return every[every.isfinite()].unique()


def round_range(weight: Tensor, ratio: float, args: QuantArgs) -> tuple[Tensor, float, float]:
    """Weights ``[n]`` of one group, rounded in a range of ``ratio`` times the full one.

    Gives the rounded weights, their scale and their zero point.
    """
    weight = weight.float()
    low, high = weight.min().clamp(max=0) * ratio, weight.max().clamp(min=0) * ratio
    levels = 2**args.bits
    if args.symmetric:
        top = float_grid(args.dtype)[-1] if args.is_float else (levels - 1) / 2
        scale = torch.maximum(-low, high) / top
    else:
        scale = (high - low) / (levels - 1)
    scale = scale.to(getattr(torch, args.scale_dtype)).float()
    quotient = weight / scale
    if args.is_float:
        grid = float_grid(args.dtype)
        codes = grid[(quotient.double()[:, None] - grid).abs().argmin(1)]
        return codes.double() * scale, scale.item(), 0.0
    if args.symmetric:
        codes = quotient.round().clamp(-levels / 2, levels / 2 - 1)
        return codes.double() * scale, scale.item(), 0.0
    zero = (-low / scale).round().clamp(0, levels - 1)
    codes = (quotient.round() + zero).clamp(0, levels - 1)
    return (codes - zero).double() * scale, scale.item(), zero.item()


def group_slices(width: int, args: QuantArgs) -> Iterator[slice]:
    size = args.group_size or width
    return (slice(start, start + size) for start in range(0, width, size))


def ranges(args: QuantArgs, steps: int, smallest: float) -> list[float]:
    """From a range so wide that the largest weight, of either sign, is not clipped."""
    levels = 2**args.bits
    integer = args.symmetric and not args.is_float
    largest = ((levels - 1) / 2) / (levels / 2 - 1) if integer else 1.0
    return [largest - i * (largest - smallest) / steps for i in range(steps + 1)]


def round_weight(weight: Tensor, args: QuantArgs) -> Tensor:
    """All groups of ``weight: [out, in]`` in their full ranges."""
    rounded = torch.empty(weight.shape, dtype=torch.float64)
    for row in range(len(weight)):
        for part in group_slices(weight.shape[1], args):
            rounded[row, part] = round_range(weight[row, part], 1.0, args)[0]
    return rounded


@dataclass
class Clips:
    """Of each row, group and ratio: ``[out, groups, ratios]``, weights ``[out, in, ratios]``.

    ``errors`` are squared and summed over all tokens, of the part of the output that the group
    makes on its own.
    """

    errors: Tensor
    scales: Tensor
    zeros: Tensor
    rounded: Tensor


def every_clip(weight: Tensor, x: Tensor, args: QuantArgs, ratios: list[float]) -> Clips:
    parts = list(group_slices(weight.shape[1], args))
    shape = (len(weight), len(parts), len(ratios))
    errors, scales, zeros = (torch.empty(shape, dtype=torch.float64) for _ in range(3))
    rounded = torch.empty(*weight.shape, len(ratios), dtype=torch.float64)
    for row in range(len(weight)):
        for number, part in enumerate(parts):
            group, read = weight[row, part], x[:, part].double()
            for i, ratio in enumerate(ratios):
                made, scale, zero = round_range(group, ratio, args)
                rounded[row, part, i], scales[row, number, i] = made, scale
                zeros[row, number, i] = zero
                errors[row, number, i] = (read @ made - read @ group.double()).square().sum()
    return Clips(errors, scales, zeros, rounded)


def clip_weight(weight: Tensor, x: Tensor, args: QuantArgs, ratios: list[float]) -> Tensor:
    """Each group in the range of least error."""
    clips = every_clip(weight, x, args, ratios)
    size = args.group_size or weight.shape[1]
    best = clips.errors.argmin(-1).repeat_interleave(size, dim=1)
    return clips.rounded.gather(2, best[..., None])[..., 0]


def round_tokens(x: Tensor, args: QuantArgs | None) -> Tensor:
    if args is None:
        return x
    top = float_grid(args.dtype)[-1] if args.is_float else 2 ** (args.bits - 1) - 1
    scale = x.abs().amax(1, keepdim=True) / top
    if args.is_float:
        grid = float_grid(args.dtype)
        return grid[((x / scale).double()[..., None] - grid).abs().argmin(-1)] * scale
    return (x / scale).round().clamp(-top - 1, top) * scale


def loss(
    linears: tuple[Linear, ...],
    x: Tensor,
    scale: Tensor,
    ratios: list[float] | None = None,
) -> float:
    """Squared error over all tokens of what the linears make of ``x``, by plain products."""
    total = 0.0
    for linear in linears:
        scaled, read = linear.weight * scale, x / scale
        if ratios is None:
            rounded = round_weight(scaled, linear.args)
        else:
            rounded = clip_weight(scaled, read, linear.args, ratios)
        output = round_tokens(read, linear.activations).double() @ rounded.T
        total += (output - x.double() @ linear.weight.double().T).square().sum().item()
    return total


def candidates(
    linears: tuple[Linear, ...], x: Tensor, version: str, count: int
) -> Iterator[Tensor]:
    """The scales of the paper's grid, and none."""
    mean = x.abs().mean(0)
    yield torch.ones_like(mean)
    relative = torch.zeros_like(mean)
    for linear in linears:
        for part in group_slices(len(mean), linear.args):
            size = linear.weight[:, part].abs()
            relative[part] += (size / size.amax(1, keepdim=True)).mean(0) / len(linears)
    for step in range(count):
        ratio = step / count
        scale = mean.pow(ratio)
        if version == "v1":
            scale = scale / relative.pow(1 - ratio)
        yield scale / (scale.max() * scale.min()).sqrt()


class Recorded(Block):
    """Notes how it is smoothed."""

    def __init__(self, *groups: InputGroup) -> None:
        super().__init__("block", tuple(lin for g in groups for lin in g.linears), groups)
        self.scales: list[tuple[InputGroup, Tensor]] = []

    def shared(self, group: InputGroup, per_channel: Tensor) -> Tensor:
        return per_channel

    def smooth(self, group: InputGroup, scale: Tensor) -> None:
        self.scales.append((group, scale))


def awq(**options: Any) -> AWQ:
    return AWQ(Params(**{"clip": False, "ratios": 20, **options}))


def check_best(found: Tensor, tried: list[Tensor], losses: list[float]) -> int:
    """``found`` is that of ``tried`` with the least loss; which it is."""
    best = min(range(len(losses)), key=losses.__getitem__)
    torch.testing.assert_close(found, tried[best], rtol=RTOL, atol=0)
    return best


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v2"])
@every_grid
def test_the_scale_of_least_error_is_chosen(
    grid: str,
    version: str,
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
    make_group: MakeGroup,
) -> None:
    args, x = GRIDS[grid], make_inputs(90, 64)
    linears = tuple(make_linear(rows, 64, args, seed=rows) for rows in (12, 4, 5))
    group = make_group(x, *linears)
    block = Recorded(group)
    awq(version=version).transform(block)
    ((smoothed, scale),) = block.scales
    assert smoothed is group
    tried = list(candidates(linears, x, version, 20))
    losses = [loss(linears, x, candidate) for candidate in tried]
    best = check_best(scale, tried, losses)
    if not args.is_float:
        assert best > 1  # some scale helps, and it is not the first that was tried
        assert losses[best] < 0.97 * losses[0]


@pytest.mark.parametrize(
    ("grid", "activations"),
    [
        ("int8 channels", "int8 tokens"),
        ("int4 groups", "int4 tokens"),
        ("e4m3 channels", "e4m3 tokens"),
        ("e4m3 channels", "int8 tokens"),
        ("e2m1 groups", "e2m1 tokens"),
    ],
)
def test_rounded_inputs_count_where_they_will_be_rounded(
    grid: str,
    activations: str,
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
    make_group: MakeGroup,
) -> None:
    x = make_inputs(90, 64)
    linears = tuple(
        make_linear(rows, 64, GRIDS[grid], activations=ACTIVATIONS[activations], seed=rows)
        for rows in (24, 9)
    )
    block = Recorded(make_group(x, *linears))
    awq().transform(block)
    ((_, scale),) = block.scales
    tried = list(candidates(linears, x, "v2", 20))
    losses = [loss(linears, x, candidate) for candidate in tried]
    best = check_best(scale, tried, losses)
    weights_alone = [
        loss(tuple(Linear(lin.name, lin.weight, lin.args) for lin in linears), x, candidate)
        for candidate in tried
    ]
    assert losses[best] > 1.05 * weights_alone[best]  # it is something that is counted


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("grid", ["int4 groups", "int2 groups, asymmetric", "int3 channels"])
def test_ratios_are_judged_with_the_clips_that_follow(
    grid: str,
    steps: int,
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
    make_group: MakeGroup,
) -> None:
    args, x = GRIDS[grid], make_inputs(60, 32)
    linears = (make_linear(12, 32, args), make_linear(5, 32, args, seed=5))
    block = Recorded(make_group(x, *linears))
    awq(ratios=6, clip=True, clip_in_search=steps, clip_smallest=0.5).transform(block)
    ((_, scale),) = block.scales
    tried = list(candidates(linears, x, "v2", 6))
    within = ranges(args, steps, 0.5) if steps else None
    check_best(scale, tried, [loss(linears, x, candidate, within) for candidate in tried])


def test_groups_that_cannot_be_scaled_are_passed_over(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    args = GRIDS["int4 groups"]
    fixed = make_group(make_inputs(50, 32), make_linear(8, 32, args), scalable=False)
    free = make_group(make_inputs(50, 32, 1), make_linear(8, 32, args, seed=1))
    block = Recorded(fixed, free)
    awq(clip=True).transform(block)
    assert [group for group, _ in block.scales] == [free]
    assert all(linear.scale is not None for linear in block.linears)  # clips have no need of it
    block = Recorded(free)
    awq(scale=False).transform(block)
    assert block.scales == []


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt-neox"])
def test_values_that_are_shared_by_heads_are_scaled_alike(
    name: str,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The best of the scales that are averaged over query heads of one key-value head."""
    walk = start_walk(family(name), make_tokens(6, 20))
    block = walk.gather(walk._view.blocks[0])
    group = block.groups[1]
    heads, head = (2, 24) if name == "llama" else (2, 16) if name == "phi3" else (4, 16)
    x = group.sample.clone()
    assert len(x) == 120  # every token

    def averaged(scale: Tensor) -> Tensor:
        return (
            scale.view(heads, -1, head).mean(1, keepdim=True).expand(-1, 4 // heads, -1).flatten()
        )

    tried = [averaged(scale) for scale in candidates(group.linears, x, "v2", 20)]
    losses = [loss(group.linears, x, scale) for scale in tried]
    given: list[tuple[InputGroup, Tensor]] = []
    smooth = LiveBlock.smooth
    monkeypatch.setattr(
        LiveBlock,
        "smooth",
        lambda self, g, scale: [given.append((g, scale.clone())), smooth(self, g, scale)][1],
    )
    before = group.linears[0].weight.clone()
    awq().transform(block)
    ((_, scale),) = [entry for entry in given if entry[0] is group]
    check_best(scale, tried, losses)
    torch.testing.assert_close(group.linears[0].weight, before * scale)


def test_the_error_of_the_group_is_less_for_it(
    family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    """On a real block, measured by the block's own output."""
    tokens = make_tokens(6, 20)
    walk = start_walk(family("llama"), tokens)
    plain = walk.gather("model.layers.0")
    errors = [group_error(group) for group in plain.groups]
    walk.advance("model.layers.0", {})
    block = start_walk(family("llama"), tokens).gather("model.layers.0")
    awq().transform(block)
    assert all(
        group_error(group) <= error for group, error in zip(block.groups, errors, strict=True)
    )
    assert sum(map(group_error, block.groups)) < 0.95 * sum(errors)


def group_error(group: InputGroup) -> float:
    return sum(
        output_error(dequantize(nearest(linear)) - linear.weight, group.gram)
        for linear in group.linears
    )


# --- the Gram matrix in place of tokens -----------------------------------------------------------


@every_grid
def test_the_gram_matrix_says_what_the_tokens_do(
    grid: str, make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    for tokens in (1, 3, 500):
        x = make_inputs(tokens, 64, tokens)
        linear = make_linear(33, 64, GRIDS[grid])
        group = make_group(x, linear)
        off = dequantize(nearest(linear)) - linear.weight
        direct = (x.double() @ off.double().T).square().sum().item()
        assert output_error(off, group.gram) == pytest.approx(direct, rel=RTOL)
        for scale in (torch.ones(64), x.abs().mean(0).sqrt()):
            wanted = loss((linear,), x, scale)
            (found,) = awq()._losses([group], scale[None])
            assert found == pytest.approx(wanted, rel=10 * RTOL)


def test_all_batches_count(make_linear: MakeLinear, make_group: MakeGroup) -> None:
    """Which ratio is best on the first tokens says nothing of the others."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50, 32, generator=generator)
    later = torch.randn(500, 32, generator=generator)
    later[:, ::8] *= 30
    linear = make_linear(16, 32, QuantArgs("int3", "group", 16))
    chosen = []
    for x in (first, later, torch.cat([first, later])):
        block = Recorded(make_group(x, linear))
        awq().transform(block)
        tried = list(candidates((linear,), x, "v2", 20))
        best = check_best(block.scales[0][1], tried, [loss((linear,), x, s) for s in tried])
        chosen.append(best)
    assert chosen[0] != chosen[1]
    assert chosen[2] != chosen[0]


# --- clips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "smallest"), [(20, 0.5), (7, 0.8), (1, 0.05)])
@every_grid
def test_clips_of_least_error_are_chosen(
    grid: str,
    steps: int,
    smallest: float,
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
) -> None:
    args = GRIDS[grid]
    x, linear = make_inputs(60, 64), make_linear(13, 64, args)
    linear.weight[4] = 0
    linear.weight[5] = linear.weight[5].abs()
    linear.weight[6] = -linear.weight[6].abs()
    before = linear.weight.clone()
    search_clip(linear, x.T @ x, steps=steps, smallest=smallest)
    assert torch.equal(linear.weight, before)
    assert linear.scale is not None
    within = ranges(args, steps, smallest)
    live = torch.tensor([row for row in range(13) if row != 4])
    clips = every_clip(linear.weight[live], x, args, within)
    errors, scales = clips.errors, clips.scales
    best = errors.argmin(-1, keepdim=True)
    chosen = (scales - linear.scale[live].double()[..., None]).abs().argmin(-1, keepdim=True)
    # The scale is one of those tried, and none that was tried is better.
    torch.testing.assert_close(
        scales.gather(-1, chosen)[..., 0], linear.scale[live].double(), rtol=2.0**-22, atol=0
    )
    ahead = errors.gather(-1, chosen) / errors.gather(-1, best)
    assert ahead.max() <= 1 + 10 * RTOL
    assert (chosen == best).float().mean() > 0.98  # but for scales that are stored as the same
    if args.symmetric:
        assert linear.zero is None
    else:
        assert linear.zero is not None
        assert torch.equal(clips.zeros.gather(-1, chosen)[..., 0], linear.zero[live].double())
    assert (linear.scale > 0).all()
    codes = nearest(linear)  # who computes codes takes them
    assert codes.scale is linear.scale
    assert (dequantize(codes)[4] == 0).all()
    if not args.is_float and steps > 1:
        assert len(best.unique()) > 1  # it is not one ratio for all


def test_the_layer_completes_the_statistics_by_which_an_expert_is_clipped(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    """Also those of an expert without tokens; with ``prior`` 0 its range stays full."""
    x, args = make_inputs(200, 64), GRIDS["int4 groups"]
    gram = x.T @ x
    scales: dict[float, list[Tensor | None]] = {}
    for prior in (0.0, 2.0):
        few, none, rest = (make_linear(8, 64, args, name=f"mlp.{e}.up") for e in range(3))
        parts = (make_group(x[:5], few), make_group(x[:1] * 0, none), make_group(x[5:], rest))
        parts[1].tokens = 0
        whole = replace(make_group(x, few, none, rest), by_expert=parts)
        block = Block("block", whole.linears, (whole,))
        awq(scale=False, clip=True, prior=prior).transform(block)
        scales[prior] = [linear.scale for linear in (few, none)]
        grams = [part.gram for part in parts[:2]]
        if prior:
            grams = [completed_gram([part], whole, prior)[0] for part in parts[:2]]
            assert block.notes == [*completed_experts([whole])]
        for linear, own in zip((few, none), grams, strict=True):
            wanted = make_linear(8, 64, args)
            search_clip(wanted, own, steps=20, smallest=0.6)
            assert linear.scale is None if not own.any() else linear.scale is not None
            if linear.scale is not None and wanted.scale is not None:
                assert torch.equal(linear.scale, wanted.scale)

    def error(scale: Tensor | None) -> float:
        linear = make_linear(8, 64, args)
        linear.scale = scale
        off = dequantize(nearest(linear)) - linear.weight
        return float(((off @ gram) * off).sum())

    for alone, completed in zip(scales[0.0], scales[2.0], strict=True):
        assert error(completed) < error(alone)


def test_clips_are_searched_for_a_part_of_the_rows_at_a_time(
    make_inputs: MakeInputs, make_linear: MakeLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make_inputs(60, 64)
    for grid in ("int4 groups", "int4 groups, asymmetric"):
        whole, parts = make_linear(23, 64, GRIDS[grid]), make_linear(23, 64, GRIDS[grid])
        search_clip(whole, x.T @ x, steps=8, smallest=0.5)
        with monkeypatch.context() as patch:
            patch.setattr("qplug.numerics.clipping._CHUNK", 5 * 64)
            search_clip(parts, x.T @ x, steps=8, smallest=0.5)
        assert whole.scale is not None
        assert parts.scale is not None
        assert torch.equal(whole.scale, parts.scale)
        if whole.zero is not None:
            assert parts.zero is not None
            assert torch.equal(whole.zero, parts.zero)


@pytest.mark.parametrize(
    "args",
    [QuantArgs("e4m3", "block", block=(16, 16)), QuantArgs("int8", "tensor")],
    ids=["blocks", "tensor"],
)
def test_rows_that_share_a_scale_are_scaled_and_not_clipped(
    args: QuantArgs, make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    linear = make_linear(40, 72, args)
    block = Recorded(make_group(make_inputs(60, 72), linear))
    awq(clip=True).transform(block)
    assert len(block.scales) == 1
    assert linear.scale is None
    assert nearest(linear).scale.shape == args.scale_shape((40, 72))


# --- clips and scales reach what is stored --------------------------------------------------------


def stored_codes(folder: Path) -> dict[str, QuantizedWeight]:
    opened = open_folder(str(folder), Session.alone())
    assert opened.exporter is not None
    found = {}
    for name, scheme in opened.schemes.items():
        tensors = {
            tensor.removeprefix(f"{name}."): opened.checkpoint.read(tensor)
            for tensor in opened.checkpoint.tensors
            if tensor.rpartition(".")[0] == name and not tensor.endswith("bias")
        }
        found[name] = opened.exporter.format.unpack(tensors, scheme)
    return found


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
def test_clips_reach_the_final_codes(
    scheme: str,
    tmp_path: Path,
    family: Family,
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same scales of inputs, only ranges of weights differ; gptq keeps them."""
    tokens = make_tokens(6, 20)
    monkeypatch.setattr(
        "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
    )
    options: dict[str, Any] = {"ratios": 4, "clip_steps": 5, "clip_in_search": 0}

    def run(algo: str, clip: bool) -> dict[str, QuantizedWeight]:
        out = qplug.quantize(
            str(family("llama")),
            tmp_path / f"{algo} {clip}",
            algo=algo,
            scheme=scheme,
            group_size=16,
            backend="compressed-tensors",
            propagate="float",  # so that all see the same statistics
            algorithm_options={"awq": {**options, "clip": clip}},
            device="cpu",
        ).out
        return stored_codes(out)

    full, clipped, compensated = run("awq", False), run("awq", True), run("awq+gptq", True)
    args = Scheme("", clipped["model.layers.0.mlp.up_proj"].args).weights
    tried = torch.tensor(ranges(args, 5, 0.6))
    used: set[float] = set()
    for name in full:
        ratio = clipped[name].scale / full[name].scale
        assert ((ratio[..., None] - tried).abs().amin(-1) <= 1e-5).all()
        used |= set(ratio.round(decimals=3).flatten().tolist())
        assert torch.equal(compensated[name].scale, clipped[name].scale)
        assert (compensated[name].codes != clipped[name].codes).any()
        if clipped[name].zero is not None:
            assert torch.equal(compensated[name].zero, clipped[name].zero)
    assert len(used) > 2
