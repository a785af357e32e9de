"""Beside the quantized stream a float one; groups that see what became of those before; padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qplug
from qplug import InputGroup, Linear, QuantArgs
from qplug.api.groups import dequantize
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.walk import Walk
from qplug.errors import QplugError
from qplug.numerics.rounding import round_to_nearest
from qplug_gptq import solver
from qplug_gptq.gptq import GPTQ, Params

Family = Callable[..., Path]
StartWalk = Callable[..., Walk]
MakeTokens = Callable[..., Tensor]
MakeInputs = Callable[..., Tensor]
MakeLinear = Callable[..., Linear]
MakeGroup = Callable[..., InputGroup]

RTOL = 1e-4


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def nearest_codes(block: LiveBlock) -> dict[str, Any]:
    return {lin.name: round_to_nearest(lin.weight, lin.args) for lin in block.linears}


@torch.no_grad()
def inputs_of(folder: Path, values: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """What every linear reads, ``[tokens, in]``, in a model with some weights replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.load_state_dict(values, strict=False)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def keep(module: Any, args: Any, name: str = name) -> None:
                seen[name] = args[0].flatten(0, -2)

            module.register_forward_pre_hook(keep)
    model(input_ids=tokens)
    return seen


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_drift_is_what_the_float_model_has_more(
    name: str,
    batch_size: int | None,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
) -> None:
    tokens = make_tokens(5, 12)
    walk = start_walk(
        family(name), tokens, propagate="quantized", with_drift=True, batch_size=batch_size
    )
    ideal = inputs_of(family(name), {}, tokens)
    served: dict[str, Tensor] = {}
    for block_name in walk._view.blocks:
        block = walk.gather(block_name)
        real = inputs_of(family(name), served, tokens)
        for group in block.groups:
            x = real[group.linears[0].name].double()
            off = ideal[group.linears[0].name].double() - x
            assert distance(group.gram, x.T @ x) <= RTOL
            if block_name == walk._view.blocks[0]:
                assert group.drift is None
                continue
            assert group.drift is not None
            assert group.total_shift is not None
            assert distance(group.drift, x.T @ off) <= RTOL
            assert (group.total_shift - off.sum(0)).norm() <= RTOL * off.abs().sum(0).norm()
        codes = nearest_codes(block)
        served |= {f"{linear}.weight": dequantize(weight) for linear, weight in codes.items()}
        walk.advance(
            block_name, block.effective_parameters(codes, {}, torch.float32) | _floats(block, codes)
        )


def _floats(block: LiveBlock, codes: dict[str, Any]) -> dict[str, Tensor]:
    names = {f"{name.removeprefix(block.name + '.')}.weight" for name in codes}
    return {local: value for local, value in block.weights32.items() if local not in names}


def test_drift_follows_scales_and_shifts(
    family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    walk = start_walk(
        family("opt"), make_tokens(4, 12), propagate="quantized", with_drift=True, batch_size=1
    )
    first = walk.gather(walk._view.blocks[0])
    codes = nearest_codes(first)
    walk.advance(
        first.name, first.effective_parameters(codes, {}, torch.float32) | _floats(first, codes)
    )
    block = walk.gather(walk._view.blocks[1])
    group = next(group for group in block.groups if group.shiftable)
    x = group.sample.clone().double()  # all tokens: there are few
    assert len(x) == group.tokens
    assert group.drift is not None
    assert group.total_shift is not None
    drift, lag = group.drift.clone().double(), group.total_shift.clone().double()
    offset = torch.linspace(-1, 1, x.shape[1])
    block.shift(group, offset)
    moved = (x - group.sample.double()).mean(0)  # the offset as the bias could take it
    assert distance(group.drift, drift - moved[:, None] * lag) <= RTOL
    assert distance(group.total_shift, lag) == 0
    before = group.drift.clone().double()
    scale = torch.linspace(0.5, 2, x.shape[1])
    rows = group.sample.clone()
    block.smooth(group, scale)
    taken = (rows / group.sample).nanmean(0).double()
    assert distance(group.drift, before / (taken[:, None] * taken)) <= RTOL
    assert distance(group.total_shift, lag / taken) <= RTOL


def test_a_correction_makes_good_what_it_can(
    make_inputs: MakeInputs, make_linear: MakeLinear
) -> None:
    """At 1 it is the least-squares solution of ``X Ŵᵀ = Y Wᵀ``, at 0 the weight."""
    y = make_inputs(300, 24)
    x = y + 0.2 * make_inputs(300, 24, seed=1)
    weight = make_linear(16, 24, QuantArgs("int4", "channel")).weight
    wanted = torch.linalg.lstsq(x.double(), y.double() @ weight.T.double()).solution.T
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    factor, _ = solver.inverse_factor((x.T @ x)[None], order[None], 1e-7)
    for part in (0.0, 0.5, 1.0):
        drift = (x.T @ (y - x))[None]
        (found,) = solver.corrected(weight[None], drift, factor, order[None], part)
        assert distance(found, weight + part * (wanted - weight)) <= 1e-3


def test_gptq_rounds_the_corrected_weight(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    y = make_inputs(300, 32)
    x = y + 0.5 * make_inputs(300, 32, seed=1)
    args = QuantArgs("int4", "group", 16)
    misses = []
    for correct in (0.0, 1.0):
        group = make_group(x, make_linear(16, 32, args))
        group.drift, group.total_shift = x.T @ (y - x), (y - x).sum(0)
        algorithm = GPTQ(Params(correct=correct, damp=0.01))
        assert algorithm.needs_drift == (correct > 0)
        block = qplug.Block("block", group.linears, (group,))
        made = algorithm.quantize(block)["linear"]
        misses.append((x @ dequantize(made).T - y @ group.linears[0].weight.T).norm())
    assert misses[1] < 0.9 * misses[0]


@pytest.mark.parametrize("panel", [1, 5, 16, 23, 64])
def test_a_factor_made_in_panels_is_that_of_the_whole(
    panel: int, make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "_PANEL", panel)
    monkeypatch.setattr(solver, "_PANEL_OF_SEVERAL", {"cpu": panel})
    several = [make_inputs(200, 23, seed=seed) for seed in range(3)]
    grams = [(x.T @ x).double() for x in several]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(23, generator=generator) for _ in grams]
    alone = [
        solver.inverse_factor(gram.float()[None], order[None], 0.01)
        for gram, order in zip(grams, orders, strict=True)
    ]
    factors, damps = solver.inverse_factor(torch.stack(grams).float(), torch.stack(orders), 0.01)
    assert damps == [0.01] * 3
    for factor, gram, order, (own, _) in zip(factors, grams, orders, alone, strict=True):
        assert distance(factor, own[0]) <= RTOL
        assert torch.equal(factor, factor.triu())
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(23)
        inverse = torch.linalg.inv(damped[order[:, None], order])
        assert distance(factor.T @ factor, inverse) <= RTOL


def test_a_matrix_that_needs_more_damping_leaves_its_neighbours_as_they_are(
    make_inputs: MakeInputs,
) -> None:
    # Each begins at an address of the same alignment: products may depend on that.
    whole = make_inputs(200, 32)
    narrow = whole[:5].T @ whole[:5]  # of rank 5
    grams = [whole.T @ whole, narrow - 0.02 * narrow.diagonal().mean() * torch.eye(32)]
    grams.append(grams[0])
    order = torch.arange(32).expand(3, 32)
    assert torch.linalg.eigvalsh(grams[1]).min() < 0
    factors, damps = solver.inverse_factor(torch.stack(grams), order, 0.01)
    (alone,), (damp,) = solver.inverse_factor(grams[1][None], order[:1], 0.01)
    assert damps == [0.01, damp, 0.01]
    assert damp > 0.01
    assert torch.equal(factors[0], factors[2])
    assert distance(factors[1], alone) <= RTOL


@pytest.mark.parametrize("panel", [5, 16, 64])
@pytest.mark.parametrize("positive", [True, False])
def test_a_large_matrix_is_factored_in_its_own_memory(
    panel: int, *, positive: bool, make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "_PANEL", panel)
    x = make_inputs(200 if positive else 5, 32)
    gram = (x.T @ x)[None].contiguous()
    gram -= 0 if positive else 0.02 * gram[0].diagonal().mean() * torch.eye(32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))[None]
    wanted, dampings = solver.inverse_factor(gram, order, 0.01)
    assert (dampings == [0.01]) == positive
    before = gram.clone()
    monkeypatch.setattr(solver, "_LARGE", 0)
    with solver.factored(gram, order, 0.01) as (factor, damps):
        assert factor.data_ptr() == gram.data_ptr()
        assert distance(factor.triu(), wanted) <= RTOL
        assert damps == dampings
    assert torch.equal(gram, before)


def test_a_matrix_that_cannot_be_factored_in_its_own_memory_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(solver, "_LARGE", 0)
    gram = -torch.ones(1, 8, 8) + 0.5 * torch.eye(8)
    before, order = gram.clone(), torch.arange(8)[None]
    with (
        pytest.raises(QplugError, match="cannot be factored"),
        solver.factored(gram, order, 0.01),
    ):
        pass
    assert torch.equal(gram, before)


# --- true-sequential ------------------------------------------------------------------------------


@pytest.mark.parametrize("propagate", ["float", "quantized"])
@pytest.mark.parametrize("with_drift", [False, True])
def test_groups_see_what_became_of_those_before(
    propagate: str,
    with_drift: bool,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
) -> None:
    tokens = make_tokens(4, 12)
    walk = start_walk(family("llama"), tokens, propagate=propagate, with_drift=with_drift)
    served: dict[str, Tensor] = {}
    for block_name in walk._view.blocks[:2]:
        block = walk.gather(block_name)
        block.smooth(block.groups[0], torch.linspace(0.5, 2, 64))
        codes: dict[str, Any] = {}
        here: dict[str, Tensor] = {}
        for group in block.groups:
            fed = {} if propagate == "float" else served
            x = inputs_of(family("llama"), fed | here, tokens)[group.linears[0].name].double()
            if group is block.groups[0]:
                x = x / torch.linspace(0.5, 2, 64)
            assert distance(group.gram, x.T @ x) <= RTOL
            made = {lin.name: round_to_nearest(lin.weight, lin.args) for lin in group.linears}
            codes |= made
            # The norm takes the scale that the codes of its readers have in them.
            here |= {f"{name}.weight": dequantize(weight) for name, weight in made.items()}
            here |= {f"{block_name}.{n}": value for n, value in _floats(block, codes).items()}
            block.use_codes(made)
        served |= here
        walk.advance(
            block_name, block.effective_parameters(codes, {}, torch.float32) | _floats(block, codes)
        )


@pytest.mark.parametrize("correct", ["0", "0.5"])
def test_true_sequential_runs_and_tells_another_result(
    correct: str, family: Family, tmp_path: Path
) -> None:
    made = []
    for sequential in ("false", "true"):
        qplug.quantize(
            str(family("qwen3")),
            tmp_path / sequential,
            algo="gptq",
            backend="compressed-tensors",
            group_size=16,
            samples=4,
            seq_len=16,
            device="cpu",
            algorithm_options={"gptq": {"true_sequential": sequential, "correct": correct}},
        )
        made.append((tmp_path / sequential / "model.safetensors").read_bytes())
    assert made[0] != made[1]


# --- shorter samples ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt-neox"])
def test_padding_enters_no_statistics(
    name: str,
    batch_size: int | None,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
) -> None:
    tokens = make_tokens(3, 14)
    lengths = [14, 5, 1]
    alone = [tokens[i : i + 1, :length].clone() for i, length in enumerate(lengths)]
    for i, length in enumerate(lengths):
        tokens[i, length:] = -1
    walk = start_walk(family(name), tokens, propagate="float", batch_size=batch_size)
    each = [inputs_of(family(name), {}, sample) for sample in alone]
    for block_name in walk._view.blocks:
        block = walk.gather(block_name)
        for group in block.groups:
            x = torch.cat([seen[group.linears[0].name] for seen in each]).double()
            assert group.tokens == len(x) == 20
            assert distance(group.gram, x.T @ x) <= RTOL
            assert distance(group.mean_abs, x.abs().mean(0)) <= RTOL
            assert torch.allclose(group.low.double(), x.amin(0), rtol=RTOL, atol=1e-6)
            assert torch.allclose(group.high.double(), x.amax(0), rtol=RTOL, atol=1e-6)
            assert distance(group.sample, x) <= RTOL
        walk.advance(block_name, {})
