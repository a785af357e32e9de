"""HQQ against a textbook version of it, one group of weights after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qplug
from qplug import Block, Linear, QplugError, QuantArgs
from qplug.api.groups import dequantize
from qplug.numerics.rounding import round_to_nearest
from qplug.numerics.scales import minmax_scale
from qplug_hqq import hqq
from qplug_hqq.hqq import HQQ, Params

Family = Callable[..., Path]
MakeLinear = Callable[..., Linear]

GRIDS = {
    "int4 groups": QuantArgs("int4", "group", 16),
    "int4 groups, asymmetric": QuantArgs("int4", "group", 16, symmetric=False),
    "int4 groups, bfloat16 scales": QuantArgs("int4", "group", 32, scale_dtype="bfloat16"),
    "int3 channels": QuantArgs("int3", "channel"),
    "int2 groups, asymmetric": QuantArgs("int2", "group", 16, symmetric=False),
    "int8 channels, asymmetric": QuantArgs("int8", "channel", symmetric=False),
}


def textbook(
    weights: list[float], scale: float, zero: float | None, args: QuantArgs, params: Params
) -> tuple[float, float | None]:
    """The scale and the zero point of one group, by the paper's iteration, in plain floats."""
    low, high = args.code_range
    dtype = getattr(torch, args.scale_dtype)

    def rounded(scale: float, zero: float | None) -> tuple[list[float], list[float]]:
        codes = [float(torch.tensor(w / scale).round()) + (zero or 0.0) for w in weights]
        codes = [min(max(code, low), high) - (zero or 0.0) for code in codes]
        return codes, [w - code * scale for w, code in zip(weights, codes, strict=True)]

    def aims(scale: float, errors: list[float], beta: float) -> list[float]:
        """The weights less the part of their errors that is taken to be no noise."""
        found = []
        for w, error in zip(weights, errors, strict=True):
            size = max(abs(error) / scale, 1e-8)
            kept = max(abs(error) / scale - size ** (params.lp_norm - 1) / beta, 0.0)
            found.append(w - scale * (kept if error > 0 else -kept))
        return found

    def norm(errors: list[float]) -> float:
        return sum(abs(error) ** params.lp_norm for error in errors)

    beta = float(params.beta)
    codes, errors = rounded(scale, zero)
    best, least = (scale, zero), norm(errors)
    for _ in range(params.iterations):
        if zero is not None:
            aim = aims(scale, errors, beta)
            pairs = zip(codes, aim, strict=True)
            mean = sum(code + zero - a / scale for code, a in pairs) / len(aim)
            zero = min(max(float(torch.tensor(mean).round()), low), high)
            codes, errors = rounded(scale, zero)
        aim = aims(scale, errors, beta)
        square = sum(code * code for code in codes)
        if square:
            stretched = sum(code * a for code, a in zip(codes, aim, strict=True)) / square
            scale = float(torch.tensor(stretched).to(dtype)) if stretched > 0 else scale
        codes, errors = rounded(scale, zero)
        if norm(errors) < least:
            best, least = (scale, zero), norm(errors)
        beta *= params.kappa
    return best


@pytest.mark.parametrize("grid", GRIDS)
def test_the_textbook(grid: str, make_linear: MakeLinear) -> None:
    linear = make_linear(6, 64, GRIDS[grid])
    found = HQQ(Params()).quantize(Block("b", (linear,)))["linear"]
    scale, zero = minmax_scale(linear.weight, linear.args)
    size = linear.args.group_size or 64
    for row in range(6):
        for group in range(64 // size):
            wanted = textbook(
                linear.weight[row, group * size : (group + 1) * size].tolist(),
                float(scale[row, group]),
                None if zero is None else float(zero[row, group]),
                linear.args,
                Params(),
            )
            assert float(found.scale[row, group]) == pytest.approx(wanted[0], rel=1e-5)
            if found.zero is not None:
                assert float(found.zero[row, group]) == wanted[1]
    nearest = round_to_nearest(linear.weight, linear.args)
    wanted_codes = replace(nearest, scale=found.scale, zero=found.zero)
    steps = (linear.weight - dequantize(found)) / found.scale.repeat_interleave(size, 1)
    inner = found.codes != wanted_codes.codes  # some grid did move
    assert inner.any()
    low, high = linear.args.code_range
    unclipped = (found.codes > low) & (found.codes < high)
    assert (steps.abs()[unclipped] <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_no_group_has_more_of_what_it_makes_small(grid: str, make_linear: MakeLinear) -> None:
    linear = make_linear(16, 64, GRIDS[grid])
    found = dequantize(HQQ(Params()).quantize(Block("b", (linear,)))["linear"])
    before = dequantize(round_to_nearest(linear.weight, linear.args))
    size = linear.args.group_size or 64
    groups = linear.weight.unflatten(1, (-1, size))
    ours, theirs = (
        (groups - w.unflatten(1, (-1, size))).abs().pow(0.7).sum(-1) for w in (found, before)
    )
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < theirs.sum()


def test_scales_that_were_chosen_stay(make_linear: MakeLinear) -> None:
    """AWQ's clips were found on data."""
    linear = make_linear(8, 64, GRIDS["int4 groups"])
    linear.scale = minmax_scale(linear.weight, linear.args)[0] * 0.7
    made = HQQ(Params()).quantize(Block("b", (linear,)))["linear"]
    assert torch.equal(made.scale, linear.scale)
    plain = HQQ(Params()).quantize(Block("b", (replace(linear, scale=None),)))["linear"]
    assert not torch.equal(made.scale, plain.scale)


def test_rows_at_a_time(make_linear: MakeLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make_linear(7, 64, GRIDS["int4 groups, asymmetric"])
    whole = HQQ(Params()).quantize(Block("b", (linear,)))["linear"]
    monkeypatch.setattr(hqq, "_CHUNK", {"cpu": 128})
    parts = HQQ(Params()).quantize(Block("b", (linear,)))["linear"]
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "WE2M1A16"])
def test_floats_are_refused(scheme: str, family: Family, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match=f"^hqq: solves for integer grids.*{scheme}"):
        qplug.quantize(
            str(family("llama")), tmp_path / "out", algo="hqq", scheme=scheme, backend="fake"
        )
    assert not list(tmp_path.iterdir())


def test_a_layer_in_another_scheme_is_refused_too(family: Family, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match=r"^hqq: solves for integer grids.*FP8_DYNAMIC"):
        qplug.quantize(
            str(family("llama")),
            tmp_path / "out",
            algo="hqq",
            overrides={"*.down_proj": "FP8_DYNAMIC"},
        )


@pytest.mark.parametrize(
    "scheme",
    ["W4A16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("W4A16_ASYM", "W8A8"))],
)
def test_whole_models_without_data(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor by tensor: nothing walks through the model."""
    monkeypatch.setattr("qplug.run.calibrated.Walk", None)
    backend = "vllm" if scheme == "W4A16_ASYM" else "sglang"
    result = qplug.quantize(
        "qplug:demo", tmp_path / "out", algo="hqq", scheme=scheme, backend=backend, device="cpu"
    )
    assert qplug.verify(str(result.out)).problems == ()
    assert max(result.errors.values()) < 0.2
