"""What algorithms that learn are given of a block, and the textbook versions of what they learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qplug
from qplug import Block, Checkpoint, Linear, QplugError, QuantArgs, Reconstruction, Scheme
from qplug.api.groups import dequantize_with
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.numerics import scale_of
from qplug.numerics.activations import activation_top, fake_quantize_activations
from qplug.numerics.learning import Learned, SignSGD, learn, start_clips
from qplug.numerics.rounding import quantize
from qplug.numerics.scales import minmax_scale, range_scale, weight_range
from qplug.numerics.straight_through import (
    fake_quantize,
    range_scale_with_gradients,
    ranges_with_gradients,
    round_inputs,
)
from qplug_omniquant.omniquant import OmniQuant
from qplug_omniquant.omniquant import Params as OmniQuantParams
from qplug_signround.signround import Params as SignRoundParams
from qplug_signround.signround import SignRound

Family = Callable[..., Path]
StartWalk = Callable[..., Walk]
MakeTokens = Callable[..., Tensor]
MakeLinear = Callable[..., Linear]

GRIDS = {
    "int4 groups": QuantArgs("int4", "group", 16),
    "int4 groups, asymmetric": QuantArgs("int4", "group", 16, symmetric=False),
    "int2 groups, asymmetric, bfloat16 scales": QuantArgs(
        "int2", "group", 16, symmetric=False, scale_dtype="bfloat16"
    ),
    "int3 channels": QuantArgs("int3", "channel"),
    "int8 tensor": QuantArgs("int8", "tensor"),
    "e4m3 channels": QuantArgs("e4m3", "channel"),
    "e2m1 groups": QuantArgs("e2m1", "group", 16),
    "e4m3 blocks": QuantArgs("e4m3", "block", block=(16, 24)),
}
every_grid = pytest.mark.parametrize("grid", GRIDS)

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3"),
    *("opt", "opt, norm after", "gpt-neox", "phi"),
)
INT8_TOKENS = QuantArgs("int8", "token", dynamic=True)
W4A8 = Scheme("w4a8", QuantArgs("int4", "channel"), INT8_TOKENS)


# --- rounding that gradients go through -----------------------------------------------------------


def straight(values: Tensor, rounded: Tensor) -> Tensor:
    """The textbook's ``x + (round(x) - x).detach()``."""
    return values + (rounded - values).detach()


def textbook(
    weight: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor, args: QuantArgs
) -> Tensor:
    """The plain formula, element by element, for autograd to differentiate."""
    out, width = weight.shape
    tall, wide = args.block or (1, args.group_size or width)
    if args.strategy == "tensor":
        tall = out
    each = scale.repeat_interleave(tall, 0).repeat_interleave(wide, 1)[:out, :width]
    quotient = weight / each
    if args.is_float:
        top = {"e4m3": 448.0, "e2m1": 6.0}[args.dtype]
        bits, least = {"e4m3": (3, 2.0**-9), "e2m1": (1, 0.5)}[args.dtype]
        power = 2.0 ** quotient.detach().abs().clamp(min=1e-30).log2().floor()
        moved = quotient + offset * (power * 2.0**-bits).clamp(min=least)
        moved = moved.clamp(-top, top)
        power = 2.0 ** moved.detach().abs().clamp(min=1e-30).log2().floor()
        step = (power * 2.0**-bits).clamp(min=least)
        return straight(moved, (moved / step).round() * step) * each
    low, high = args.code_range
    codes = straight(quotient + offset, (quotient + offset).round())
    if zero is None:
        return codes.clamp(low, high) * each
    zeros = zero.repeat_interleave(tall, 0).repeat_interleave(wide, 1)[:out, :width]
    return ((codes + zeros).clamp(low, high) - zeros) * each


@pytest.mark.parametrize("clipped", [1.0, 0.6])
@every_grid
def test_gradients_are_those_of_the_plain_formula(
    grid: str, clipped: float, make_linear: MakeLinear
) -> None:
    args = GRIDS[grid]
    weight = make_linear(34, 64, args).weight
    low, high = weight_range(weight, args)
    scale, zero = range_scale(clipped * low, clipped * high, args)
    generator = torch.Generator().manual_seed(0)
    offset = torch.rand(weight.shape, generator=generator) - 0.5
    pull = torch.randn(weight.shape, generator=generator)
    zero = None if zero is None else zero.float()
    found, wanted = [], []
    for form, grads in ((fake_quantize, found), (textbook, wanted)):
        given = [None if x is None else x.clone().requires_grad_() for x in (scale, zero, offset)]
        read = weight.clone().requires_grad_()
        if form is fake_quantize:
            made = fake_quantize(read, given[0], given[1], args, given[2])
        else:
            made = textbook(read, given[0], given[1], given[2], args)
        (made * pull).sum().backward()
        grads += [made.detach(), read.grad, *(x.grad for x in given if x is not None)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if clipped < 1 and args.bits < 8:
        assert (found[1] == 0).any()  # weights that are clipped


@every_grid
def test_values_are_those_that_are_stored(grid: str, make_linear: MakeLinear) -> None:
    args = GRIDS[grid]
    weight = make_linear(34, 64, args).weight
    scale, zero = minmax_scale(weight, args)
    made = fake_quantize(weight, scale, None if zero is None else zero.float(), args)
    codes = quantize(weight, scale, zero, args)
    assert torch.equal(made, dequantize_with(codes, scale, zero, args))
    low, high = ranges_with_gradients(weight, args)
    assert torch.equal(torch.stack([low, high]), torch.stack(weight_range(weight, args)))
    wanted = range_scale(0.7 * low, 0.9 * high, args)
    found = range_scale_with_gradients(0.7 * low, 0.9 * high, args)
    assert torch.equal(found[0], wanted[0])
    if wanted[1] is not None:
        assert torch.equal(found[1], wanted[1].float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_clips_have_the_gradient_of_the_paper(symmetric: bool, make_linear: MakeLinear) -> None:
    """Learnable weight clipping, equation 2, written out with sigmoids and rounded straight."""
    args = QuantArgs("int3", "group", 16, symmetric=symmetric)
    weight = make_linear(6, 32, args).weight
    gamma, beta = (torch.full((6, 2), value, requires_grad=True) for value in (0.8, 1.2))
    pull = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    groups = weight.view(6, 2, 16)
    high = groups.amax(-1).clamp(min=0) * torch.sigmoid(gamma)
    low = groups.amin(-1).clamp(max=0) * torch.sigmoid(gamma if symmetric else beta)
    if symmetric:
        step, zero = torch.maximum(high, -low) / 3.5, torch.zeros(6, 2)
        least, most = -4, 3
    else:
        step = (high - low) / 7
        zero = straight(-low / step, (-low / step).round())
        least, most = 0, 7
    quotient = groups / step[..., None]
    codes = (straight(quotient, quotient.round()) + zero[..., None]).clamp(least, most)
    plain = ((codes - zero[..., None]) * step[..., None]).flatten(1)
    learned = [gamma] if symmetric else [gamma, beta]
    wanted = torch.autograd.grad((plain * pull).sum(), learned)
    low, high = ranges_with_gradients(weight, args)
    ends = torch.sigmoid(gamma if symmetric else beta), torch.sigmoid(gamma)
    made = fake_quantize(
        weight, *range_scale_with_gradients(low * ends[0], high * ends[1], args), args
    )
    found = torch.autograd.grad((made * pull).sum(), learned)
    torch.testing.assert_close(made, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "int4", "e4m3"])
def test_inputs_are_rounded_straight(dtype: str, make_inputs: Callable[..., Tensor]) -> None:
    x = make_inputs(20, 16).requires_grad_()
    args = QuantArgs(dtype, "token", dynamic=True)
    made = round_inputs(x, args)
    assert torch.equal(made, fake_quantize_activations(x, args))
    made.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    x.grad = None
    args, scale = QuantArgs(dtype, "tensor"), x.detach().abs().amax() / 1000
    made = round_inputs(x, args, scale)
    assert torch.equal(made, fake_quantize_activations(x, args, scale))
    made.sum().backward()
    beyond = x.detach().abs() > 500 * scale
    assert beyond.any()
    assert not x.grad[beyond].any()
    within = x.detach().abs() < 6 * scale
    assert within.any()
    assert (x.grad[within] == 1).all()


# --- what is given of a block ---------------------------------------------------------------------


@pytest.fixture
def start(start_walk: StartWalk) -> Callable[..., Walk]:
    def started(folder: Path, tokens: Tensor, **changes: Any) -> Walk:
        return start_walk(folder, tokens, with_targets=True, batch_size=2, **changes)

    return started


def reconstruction_of(block: Block) -> Reconstruction:
    assert block.reconstruction is not None
    return block.reconstruction


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_scale_and_offset_leave_the_output(
    name: str, family: Family, start: Callable[..., Walk], make_tokens: MakeTokens
) -> None:
    walk = start(family(name), make_tokens(4, 12))
    block = walk.gather(walk._view.blocks[0])
    reconstruction = reconstruction_of(block)
    values = reconstruction.parameters
    scales = []
    for group in block.groups:
        if group.shiftable:
            values = reconstruction.shifted(values, group, torch.linspace(-1, 1, len(group.gram)))
        if group.scalable:
            scale = torch.linspace(0.5, 2, len(group.gram)).requires_grad_()
            scales.append(scale)
            values = reconstruction.smoothed(values, group, block.shared(group, scale))
    assert scales
    pull = torch.zeros(())
    for batch in reconstruction.batches():
        plain, moved = (
            reconstruction.compute(given, batch, rounding=False) for given in ({}, values)
        )
        torch.testing.assert_close(plain, batch.target, rtol=1e-5, atol=1e-5)
        assert distance(moved.detach(), plain) < 1e-5
        pull = pull + reconstruction.compute(values, batch).square().sum()
    pull.backward()
    for parameter in reconstruction.parameters.values():
        assert not parameter.requires_grad
    assert all(scale.grad is not None for scale in scales)
    # What the block is told to do, it does as the pure form says.
    with torch.no_grad():
        for group, scale in zip([g for g in block.groups if g.scalable], scales, strict=True):
            if group.shiftable:
                block.shift(group, torch.linspace(-1, 1, len(group.gram)))
            block.smooth(group, scale)
        for parameter, value in reconstruction.parameters.items():
            torch.testing.assert_close(value, values[parameter].detach(), rtol=1e-4, atol=1e-5)


def test_gradients_of_shared_scales(
    family: Family, start: Callable[..., Walk], make_tokens: MakeTokens
) -> None:
    """Heads that share values: the gradient is the finite difference of the shared scale."""
    walk = start(family("llama"), make_tokens(2, 12))
    block = walk.gather("model.layers.0")
    reconstruction, group = reconstruction_of(block), block.groups[1]
    name = f"{block.name}.self_attn.v_proj.weight"
    log = torch.zeros(len(group.gram), dtype=torch.float32, requires_grad=True)

    def value(log: Tensor) -> Tensor:
        made = reconstruction.smoothed(
            reconstruction.parameters, group, block.shared(group, log.exp())
        )
        return made[name].double().pow(2).sum()

    value(log).backward()
    assert log.grad is not None
    for channel in (0, 30, 95):
        nudge = torch.zeros_like(log)
        nudge[channel] = 1e-2
        with torch.no_grad():
            slope = (value(log + nudge) - value(log - nudge)) / 2e-2
        assert float(log.grad[channel]) == pytest.approx(float(slope), rel=1e-2)


@pytest.mark.parametrize("propagate", ["quantized", "float"])
def test_targets_are_those_of_the_float_model(
    propagate: str, family: Family, start: Callable[..., Walk], make_tokens: MakeTokens
) -> None:
    folder, tokens = family("llama"), make_tokens(5, 12)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(tokens, output_hidden_states=True).hidden_states
    walk = start(folder, tokens, propagate=propagate)
    for number, name in enumerate(("model.layers.0", "model.layers.1")):
        block = walk.gather(name)
        reconstruction = reconstruction_of(block)
        assert reconstruction.steps == 3
        batches = list(reconstruction.batches())
        found = torch.cat([batch.target for batch in batches])
        torch.testing.assert_close(found, wanted[number + 1], rtol=1e-4, atol=1e-4)
        entered = torch.cat([batch.inputs for batch in batches])
        exact = number == 0 or propagate == "float"
        assert (distance(entered, wanted[number]) < 1e-4) == exact
        own = [reconstruction.compute({}, batch, rounding=False) for batch in batches]
        for aim, weight in (("block", 1.0), ("both", 0.5)):
            for batch, mine, plain in zip(reconstruction.batches(aim), own, batches, strict=True):
                middle = weight * mine + (1 - weight) * plain.target
                torch.testing.assert_close(batch.target, middle, rtol=1e-5, atol=1e-5)
        coarse = {n: v.round(decimals=1) for n, v in block.weights32.items()}
        walk.advance(name, coarse)


def test_what_has_ended_does_not_count(
    family: Family, start: Callable[..., Walk], make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(4, 12)
    tokens[1, 5:] = -1
    block = start(family("llama"), tokens).gather("model.layers.0")
    reconstruction = reconstruction_of(block)
    first, second = reconstruction.batches()
    assert (first.tokens, second.tokens) == (17, 24)
    assert second.real is None
    off = torch.zeros_like(first.target)
    off[1, 5:] = 1e6
    assert float(first.error(first.target + off)) == 0
    off[1, 4] = 2
    assert float(first.error(first.target + off)) == pytest.approx(4 / 17)


def test_inputs_are_rounded_where_the_scheme_says(
    family: Family, start: Callable[..., Walk], make_tokens: MakeTokens
) -> None:
    walk = start(family("llama"), make_tokens(2, 12), scheme=W4A8, propagate="quantized")
    block = walk.gather("model.layers.0")
    reconstruction = reconstruction_of(block)
    (batch,) = reconstruction.batches()
    rounded, plain = (
        reconstruction.compute({}, batch, rounding=rounding) for rounding in (True, False)
    )
    assert 1e-4 < distance(rounded, plain) < 0.1
    served = dict(block.weights32)
    walk.advance("model.layers.0", served)  # what an engine will compute is what was learned with
    assert torch.equal(next(iter(walk.hidden)), rounded)


# --- learning -------------------------------------------------------------------------------------


def errors_of(block: Block, weights: dict[str, Tensor]) -> float:
    reconstruction = reconstruction_of(block)
    with torch.no_grad():
        return (
            sum(
                float(batch.error(reconstruction.compute(weights, batch)))
                for batch in reconstruction.batches()
            )
            / reconstruction.steps
        )


SCHEMES = {
    "W4": Scheme("w4", QuantArgs("int4", "group", 16)),
    "W2 asymmetric": Scheme("w2", QuantArgs("int2", "group", 16, symmetric=False)),
    "W4A4": Scheme("w4a4", QuantArgs("int4", "channel"), QuantArgs("int4", "token", dynamic=True)),
    "W8A8": Scheme("w8a8", QuantArgs("int8", "channel"), INT8_TOKENS),
    "FP8": qplug.preset("FP8"),
    "FP8_DYNAMIC": qplug.preset("FP8_DYNAMIC"),
    "FP8 blocks": Scheme(
        "blocks",
        QuantArgs("e4m3", "block", block=(16, 16)),
        QuantArgs("e4m3", "group", 16, dynamic=True),
    ),
}


def stored(block: Block) -> dict[str, Tensor]:
    """What nearest codes under the chosen scales stand for."""
    made = {}
    for linear in block.linears:
        scale, zero = (
            (linear.scale, linear.zero)
            if linear.scale is not None
            else minmax_scale(linear.weight, linear.args)
        )
        codes = quantize(linear.weight, scale, zero, linear.args)
        made[f"{linear.name}.weight"] = dequantize_with(codes, scale, zero, linear.args)
    return made


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_that_is_learned_is_never_worse(
    scheme: str, family: Family, start: Callable[..., Walk], make_tokens: MakeTokens
) -> None:
    block = start(family("llama"), make_tokens(12, 12), scheme=SCHEMES[scheme]).gather(
        "model.layers.0"
    )
    for linear in block.linears:  # so that nothing is searched, and the start is known
        linear.scale, linear.zero = minmax_scale(linear.weight, linear.args)
    before = errors_of(block, stored(block))
    codes = SignRound(SignRoundParams(epochs=4)).quantize(block)
    weights = {
        f"{n}.weight": dequantize_with(c.codes, c.scale, c.zero, c.args) for n, c in codes.items()
    }
    after = errors_of(block, weights)
    assert after <= before * (1 + 1e-5)
    if scheme != "FP8":
        assert after < (0.9 if scheme.startswith(("W4", "W2")) else 1) * before
    (note,) = block.notes
    assert note.startswith("model.layers.0: output error ")
    for made in codes.values():
        assert made.scale.dtype == torch.float32
        assert (made.zero is None) == made.args.symmetric


@pytest.mark.parametrize(("rate", "same"), [(None, True), (0.02, False)])
def test_scales_of_two_levels_stay_unless_a_rate_is_given(
    rate: float | None,
    same: bool,
    family: Family,
    start: Callable[..., Walk],
    make_tokens: MakeTokens,
) -> None:
    """The search finds the best of their few codes; learning made NVFP4 worse."""
    scheme = qplug.preset("NVFP4A16")
    block = start(family("llama"), make_tokens(12, 12), scheme=scheme).gather("model.layers.0")
    start_clips(block.groups, steps=20, smallest=0.6)
    begun = {linear.name: scale_of(linear)[0].clone() for linear in block.linears}
    codes = SignRound(SignRoundParams(epochs=20, range_lr=rate)).quantize(block)
    kept = [torch.equal(codes[name].scale, scale) for name, scale in begun.items()]
    assert all(kept) == same


@pytest.mark.parametrize("scheme", SCHEMES)
def test_omniquant_reaches_the_codes(
    scheme: str, family: Family, start: Callable[..., Walk], make_tokens: MakeTokens
) -> None:
    block = start(family("llama"), make_tokens(12, 12), scheme=SCHEMES[scheme]).gather(
        "model.layers.0"
    )
    before = errors_of(block, stored(block))
    plain = {n: v.clone() for n, v in block.weights32.items()}
    OmniQuant(OmniQuantParams(epochs=4)).transform(block)
    after = errors_of(block, stored(block))
    assert after < (0.9 if scheme.startswith(("W4", "W2")) else 1.001) * before
    told = float(block.notes[0].split()[-1])
    assert after == pytest.approx(told, rel=1e-3)  # what was measured is what is stored
    reconstruction = reconstruction_of(block)
    for batch in reconstruction.batches():  # and the float model computes what it did
        moved = reconstruction.compute({}, batch, rounding=False)
        assert distance(moved, batch.target) < 1e-5
    assert any(not torch.equal(plain[name], value) for name, value in block.weights32.items())


@pytest.mark.parametrize(
    ("epochs", "rates"), [(1, [0.04, 0.02]), (100, [3.2 / 101, 1.6 / 101]), (1000, [0.01, 0.005])]
)
def test_few_steps_of_omniquant_are_longer(
    epochs: int,
    rates: list[float],
    family: Family,
    start: Callable[..., Walk],
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[float] = []

    def instead(*args: Any, **kwargs: Any) -> Learned:
        begun.extend(group["lr"] for group in args[3].param_groups)
        assert kwargs["decay"]
        return Learned(1.0, 1.0)

    monkeypatch.setattr("qplug_omniquant.omniquant.learn", instead)
    block = start(family("llama"), make_tokens(2, 12), scheme=SCHEMES["W4"]).gather(
        "model.layers.0"
    )
    assert reconstruction_of(block).steps == 1
    OmniQuant(OmniQuantParams(epochs=epochs)).transform(block)
    assert begun == pytest.approx(rates)


def test_omniquant_starts_from_the_clips_that_an_earlier_algorithm_chose(
    family: Family,
    start: Callable[..., Walk],
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another search of scales would drop the clips of its linears and of the linear before."""
    monkeypatch.setattr("qplug_omniquant.omniquant.learn", lambda *_, **__: Learned(1.0, 1.0))
    block = start(family("llama"), make_tokens(2, 12), scheme=SCHEMES["W4"]).gather(
        "model.layers.0"
    )
    for linear in block.linears:
        low, high = weight_range(linear.weight, linear.args)
        linear.scale, linear.zero = range_scale(0.8 * low, 0.8 * high, linear.args)
    chosen = {linear.name: linear.scale for linear in block.linears}
    plain = {name: weight.clone() for name, weight in block.weights32.items()}
    OmniQuant(OmniQuantParams()).transform(block)
    for name, weight in block.weights32.items():
        assert torch.equal(weight, plain[name])
    for linear in block.linears:
        torch.testing.assert_close(linear.scale, chosen[linear.name], rtol=1e-2, atol=0)


def test_the_best_is_kept_and_waiting_ends(
    family: Family, start: Callable[..., Walk], make_tokens: MakeTokens
) -> None:
    """Steps that lead away are taken back."""
    reconstruction = reconstruction_of(
        start(family("llama"), make_tokens(4, 12)).gather("model.layers.0")
    )
    name = "model.layers.0.mlp.down_proj.weight"
    weight = reconstruction.parameters[name].clone().requires_grad_()
    begun = weight.detach().clone()
    calls = []

    def values() -> dict[str, Tensor]:
        calls.append(None)
        return {name: weight * 1.01}

    found = learn(
        reconstruction, values, [weight], SignSGD([weight], lr=10.0), epochs=9, patience=2
    )
    assert found.before == found.after > 0
    assert torch.equal(weight, begun)
    assert len(calls) == 1 + 2 * (reconstruction.steps + 1)
    found = learn(reconstruction, values, [weight], SignSGD([weight], lr=1e-4), epochs=3)
    assert found.after < found.before
    assert not torch.equal(weight, begun)


def test_steps_stay_within_bounds() -> None:
    value = torch.zeros(3, requires_grad=True)
    optimizer = SignSGD([value], lr=0.3, low=-0.5, high=0.4)
    for _ in range(2):
        optimizer.zero_grad()
        (value * torch.tensor([5.0, -0.1, 0.0])).sum().backward()
        optimizer.step()
    torch.testing.assert_close(value.detach(), torch.tensor([-0.5, 0.4, 0.0]))


# --- refusals -------------------------------------------------------------------------------------


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(QplugError, match="nothing to learn: set lwc or let"):
        OmniQuant(OmniQuantParams(lwc=False, let=False))


def test_a_block_without_data_is_refused(make_linear: MakeLinear) -> None:
    block = Block("block", (make_linear(4, 16, GRIDS["int4 groups"]),))
    with pytest.raises(
        QplugError, match=r"^omniquant learns from calibration data, but this run has none$"
    ):
        OmniQuant(OmniQuantParams()).transform(block)
    with pytest.raises(
        QplugError, match=r"^signround learns from calibration data, but this run has none$"
    ):
        SignRound(SignRoundParams()).quantize(block)


def test_a_block_that_is_not_finite_is_refused(
    family: Family, start: Callable[..., Walk], make_tokens: MakeTokens
) -> None:
    block = start(family("llama"), make_tokens(2, 12)).gather("model.layers.0")
    block.weights32["mlp.down_proj.weight"][0, 0] = 1e38
    with pytest.raises(QplugError, match="not finite"):
        SignRound(SignRoundParams(epochs=1)).quantize(block)


# --- in a run -------------------------------------------------------------------------------------


@pytest.fixture
def run(
    tmp_path: Path, make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Checkpoint]:
    """``run(model, algo)``: a folder that has been verified."""
    tokens = make_tokens(6, 12)
    monkeypatch.setattr(
        "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
    )

    def quantized(model: Path, algo: str, **changes: Any) -> Checkpoint:
        short: dict[str, dict[str, Any]] = {
            "awq": {"ratios": 2, "clip_in_search": 0},
            "omniquant": {"epochs": 2},
            "signround": {"epochs": 2},
        }
        used = {name: short[name] for name in algo.split("+") if name in short}
        options = {"group_size": 16, "backend": "compressed-tensors", "batch_size": 2, **changes}
        out = qplug.quantize(
            str(model), tmp_path / algo, algo=algo, algorithm_options=used, device="cpu", **options
        ).out
        assert qplug.verify(str(out)).ok
        return open_checkpoint(out)

    return quantized


def scales_of(folder: Checkpoint, block: int) -> dict[str, Tensor]:
    return {
        name: folder.read(name)
        for name in folder.tensors
        if name.endswith("weight_scale") and f"layers.{block}." in name
    }


def test_what_is_learned_reaches_whoever_quantizes(
    family: Family, run: Callable[..., Checkpoint]
) -> None:
    """The scales of the first block; the second one has other inputs."""
    model = family("llama", torch.bfloat16)
    alone, plain = run(model, "omniquant"), run(model, "rtn")
    learned = scales_of(alone, 0)
    assert len(learned) == 7
    for algo in ("omniquant+gptq", "omniquant+signround"):
        folder = run(model, algo)
        for name, scale in scales_of(folder, 0).items():
            assert not torch.equal(scale, plain.read(name))
            if algo == "omniquant+gptq":
                assert torch.equal(scale, learned[name])
    for name in ("input_layernorm", "post_attention_layernorm"):
        weight = f"model.layers.0.{name}.weight"
        assert torch.equal(folder.read(weight), alone.read(weight))
        assert not torch.equal(folder.read(weight), plain.read(weight))


@pytest.mark.parametrize(
    ("algo", "changes"),
    [
        ("awq+omniquant", {"scheme": "W4A16_ASYM"}),
        ("quarot+omniquant", {"scheme": "W8A8", "group_size": None}),
        ("awq+omniquant+signround", {}),
        ("smoothquant+signround", {"scheme": "FP8", "group_size": None, "kv_cache": "fp8"}),
    ],
)
def test_pipelines(
    algo: str, changes: dict[str, Any], family: Family, run: Callable[..., Checkpoint]
) -> None:
    model = family("llama", torch.bfloat16)
    folder = run(model, algo, **changes)
    assert folder.config["quantization_config"]


def test_two_that_choose_codes_are_refused(family: Family, run: Callable[..., Checkpoint]) -> None:
    with pytest.raises(QplugError, match="gptq and signround both choose codes"):
        run(family("llama"), "gptq+signround")


@pytest.mark.parametrize(
    "args",
    [
        QuantArgs("int4", "token", dynamic=True),
        QuantArgs("int8", "group", 8, dynamic=True),
        QuantArgs("e4m3", "token", dynamic=True),
    ],
    ids=str,
)
def test_peaks_have_the_gradient_of_the_scale_they_make(args: QuantArgs) -> None:
    """As autograd finds it of ``round(x / s) s`` with ``s = max|x| / c``, straight through."""
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(3, 5, 16, generator=generator) for _ in range(2))
    x[1, 2] = 0
    one, other = (x.clone().requires_grad_() for _ in range(2))
    made = round_inputs(one, args, through_peaks=True)
    (made * pull).sum().backward()

    groups = other.unflatten(-1, (-1, args.group_size or 16))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-20) / activation_top(args)
    codes = groups / scale
    exact = fake_quantize_activations(x, args).unflatten(-1, (-1, args.group_size or 16))
    wanted = (straight(codes, (exact / scale).detach()) * scale).flatten(-2)
    (wanted * pull).sum().backward()
    torch.testing.assert_close(made, wanted)
    seen = x.abs().sum(-1) > 0
    torch.testing.assert_close(one.grad[seen], other.grad[seen], rtol=1e-4, atol=1e-5)
    assert torch.equal(one.grad[~seen], pull[~seen])
