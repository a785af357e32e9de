"""Scales of static inputs: observers against plain ones, and ranges that follow what moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import qplug
from qplug import Block, InputGroup, Linear, QplugError, QuantArgs, preset
from qplug.api.groups import dequantize
from qplug.calibration import batches
from qplug.calibration.observers import find_observer
from qplug.calibration.samples import Samples
from qplug.calibration.shared_scales import fix_input_scales, share_tensor_scales
from qplug.calibration.statistics import Statistics
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.view import model_view
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.rounding import round_to_nearest
from qplug.reading.folder import open_folder
from qplug.registry.registry import Registry

Family = Callable[..., Path]
StartWalk = Callable[..., Walk]
MakeTokens = Callable[..., Tensor]
MakeInputs = Callable[..., Tensor]

INT8, E4M3, INT4 = (QuantArgs(dtype, "tensor") for dtype in ("int8", "e4m3", "int4"))
TOPS = {INT8: 127.0, E4M3: 448.0, INT4: 7.0}


def seen(x: Tensor, *linears: Linear, room: int = 10**6) -> InputGroup:
    """The group of ``linears`` that read ``x: [windows, tokens, in]``."""
    known = Statistics(x.shape[-1], torch.device("cpu"), room, by_window=True)
    known.observe_windows(x, room, x.shape[1])
    return InputGroup(
        linears=linears,
        gram=known.gram,
        mean=known.mean,
        mean_abs=known.mean_abs,
        low=known.low,
        high=known.high,
        sample=known.sample,
        tokens=known.tokens,
        scalable=False,
        shiftable=False,
        after_norm=True,
        lows=known.lows,
        highs=known.highs,
    )


def peak(name: str, group: InputGroup, args: QuantArgs = INT8, **options: Any) -> float:
    return float(find_observer(name, options).peak(group, args))


# --- observers ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(1, 12), st.floats(0, 1), st.integers(0, 999)
)
def test_extremes_and_their_averages_are_the_textbook_s(
    windows: int, tokens: int, width: int, momentum: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(windows, tokens, width, generator=generator) + 0.5
    group = seen(x)
    assert peak("minmax", group) == x.abs().max().item()
    values = x.double().numpy()
    low, high = values[0].min(), values[0].max()
    for window in values[1:]:
        low += momentum * (window.min() - low)
        high += momentum * (window.max() - high)
    wanted = max(high, -low, 0.0)
    assert peak("moving-average", group, momentum=momentum) == pytest.approx(wanted, rel=1e-5)


def test_the_average_moves_by_a_hundredth() -> None:
    x = torch.tensor([[[1.0]], [[101.0]], [[-3.0]]])
    # The high goes 1, 2, 1.95; the low 1, 2, 1.95: the greater magnitude counts.
    assert peak("moving-average", seen(x)) == pytest.approx(1.95, rel=1e-6)
    assert peak("moving-average", seen(x), averaging_constant=1) == 3.0


def squared_error(x: Tensor, threshold: float, args: QuantArgs) -> float:
    """By numpy, in float64, from the definition."""
    values = x.double().numpy()
    scale = threshold / TOPS[args]
    if args.is_float:
        codes = torch.from_numpy(np.clip(values / scale, -448, 448)).float()
        codes = codes.to(torch.float8_e4m3fn).double().numpy()
    else:
        codes = np.clip(np.rint(values / scale), -TOPS[args] - 1, TOPS[args])
    return float(np.square(codes * scale - values).sum())


@pytest.mark.parametrize("args", [INT8, E4M3, INT4], ids=lambda args: args.dtype)
@pytest.mark.parametrize("kind", ["normal", "uniform", "outliers", "all alike"])
def test_no_threshold_is_much_better_than_that_of_the_histogram(kind: str, args: QuantArgs) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, 32, generator=generator)
    if kind == "uniform":
        x = torch.rand(4, 64, 32, generator=generator) - 0.5
    elif kind == "outliers":
        x[0, 0, :2] = torch.tensor([40.0, -55.0])
    elif kind == "all alike":
        x = torch.full((2, 3, 4), -0.3)
    group = seen(x)
    found = peak("histogram", group, args)
    top = x.abs().max().item()
    errors = [squared_error(x, top * 2 ** (-step / 64), args) for step in range(64 * 8)]
    assert squared_error(x, found, args) <= 1.02 * min(errors) + 1e-9
    assert found <= top
    if kind == "outliers" and args is INT4:
        assert found < top / 4


def test_inputs_that_are_all_zero_have_a_positive_scale() -> None:
    for name in ("minmax", "moving-average", "histogram"):
        linear = Linear("a", torch.ones(2, 4), preset("FP8").weights, E4M3)
        group = seen(torch.zeros(2, 3, 4), linear)
        fix_input_scales(Block("b", (linear,), (group,)), find_observer(name, {}))
        assert linear.input_scale is not None
        assert linear.input_scale.shape == (1,)
        assert 0 < linear.input_scale.item() < 1e-30


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("mean", {}, "--observer mean: must be one of minmax, moving-average, histogram"),
        ("minmax", {"momentum": 1}, "observer minmax has no option 'momentum'"),
        ("moving-average", {"momentum": 2}, "observer moving-average: momentum"),
        ("histogram", {"bins": "many"}, "observer histogram: bins"),
    ],
)
def test_observers_that_there_are_not(
    name: str, options: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(QplugError) as caught:
        qplug.quantize(
            "qplug:demo",
            tmp_path / "out",
            scheme="FP8",
            observer=name,
            observer_options=options,
        )
    assert str(caught.value).startswith(complaint)
    assert not list(tmp_path.iterdir())


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [INT8, E4M3, INT4], ids=lambda args: args.dtype)
def test_one_scale_serves_all(args: QuantArgs, make_inputs: MakeInputs) -> None:
    x = make_inputs(12, 10).view(3, 4, 10)
    for scale in (0.03, 1.7):
        rounded = fake_quantize_activations(x, args, torch.tensor([scale]))
        if args.is_float:
            codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        else:
            codes = (x / scale).round().clamp(-TOPS[args] - 1, TOPS[args])
        assert torch.equal(rounded, codes * torch.tensor(scale))
    covering = torch.tensor([x.abs().max() / TOPS[args]])
    assert torch.equal(
        fake_quantize_activations(x, args), fake_quantize_activations(x, args, covering)
    )
    assert fake_quantize_activations(x[:0], args).shape == (0, 4, 10)


# --- what the run does ----------------------------------------------------------------------------


def test_weights_of_a_group_share_their_one_scale(make_inputs: MakeInputs) -> None:
    args, x = preset("FP8").weights, make_inputs(8, 16)
    weights = [torch.randn(4, 16) * size for size in (1.0, 3.0, 0.5)]
    linears = tuple(Linear(str(n), weight, args) for n, weight in enumerate(weights))
    linears[2].scale = torch.tensor([[0.25]])  # an algorithm's choice counts too
    alone = Linear("alone", torch.randn(4, 16), preset("W8A8").weights)
    share_tensor_scales(Block("b", linears, (seen(x[None], *linears, alone),)))
    for linear in linears:
        assert linear.scale is not None
        assert linear.scale.shape == (1, 1)
        assert linear.scale.item() == max(weights[1].abs().max().item() / 448, 0.25)
    assert alone.scale is None


def test_ranges_that_no_token_has_shown_are_refused() -> None:
    linear = Linear("a", torch.ones(2, 4), preset("FP8").weights, E4M3)
    with pytest.raises(QplugError, match="a: no token of the calibration data reached it"):
        fix_input_scales(Block("b", (linear,)), find_observer("minmax", {}))
    group = seen(torch.full((1, 1, 4), torch.nan), linear)
    with pytest.raises(QplugError, match="a: no range of inputs was seen"):
        fix_input_scales(Block("b", (linear,), (group,)), find_observer("minmax", {}))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_windows_are_kept_apart_whatever_the_batch(
    batch: int,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(batches._BATCH_TOKENS, "cpu", batch * 12)
    walk = start_walk(family("llama"), make_tokens(5, 12), scheme=preset("W8A8_STATIC"))
    for group in walk.gather("model.layers.0").groups:
        windows = group.sample.view(5, 12, -1)  # few tokens: all are kept
        assert group.lows is not None
        assert group.highs is not None
        assert torch.equal(group.lows, windows.amin(1))
        assert torch.equal(group.highs, windows.amax(1))
    dynamic = start_walk(family("llama"), make_tokens(5, 12)).gather("model.layers.0")
    assert all(group.lows is None for group in dynamic.groups)


OPTIONS: dict[str, dict[str, Any]] = {
    "awq": {"ratios": 3, "clip_steps": 2, "clip_in_search": 0},
    "osplus": {"steps": 3},
}


@pytest.mark.parametrize("observer", ["minmax", "moving-average"])
@pytest.mark.parametrize(
    ("name", "algo"),
    [("llama", "smoothquant"), ("gemma2", "smoothquant"), ("qwen2", "awq"), ("opt", "osplus")],
)
def test_ranges_follow_what_moves(
    name: str,
    algo: str,
    observer: str,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
) -> None:
    """They are what a plain forward pass through the transformed float model shows."""
    tokens, folder = make_tokens(4, 20), family(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    walk = start_walk(folder, tokens, propagate="float", scheme=preset("FP8"))
    algorithm = Registry.installed().algorithms[algo]
    found: dict[str, float] = {}
    moved = 0
    for path in model_view(open_checkpoint(folder)).blocks:
        block = walk.gather(path)
        before = {linear.name: linear.weight.clone() for linear in block.linears}
        algorithm(algorithm.Params(**OPTIONS.get(algo, {}))).transform(block)
        moved += sum(not torch.equal(li.weight, before[li.name]) for li in block.linears)
        fix_input_scales(block, find_observer(observer, {}))
        for linear in block.linears:
            assert linear.input_scale is not None
            found[linear.name] = linear.input_scale.item()
        for local, value in block.weights32.items():
            model.get_parameter(f"{path}.{local}").data.copy_(value)
        walk.advance(path, {})
    assert moved
    for linear_name, windows in inputs_of(model, tokens, found).items():
        low, high = windows[0].min(), windows[0].max()
        for window in windows[1:]:
            if observer == "minmax":
                low, high = torch.minimum(low, window.min()), torch.maximum(high, window.max())
            else:
                low, high = low + 0.01 * (window.min() - low), high + 0.01 * (window.max() - high)
        wanted = max(high.item(), -low.item()) / 448
        assert found[linear_name] == pytest.approx(wanted, rel=2e-5), linear_name


@torch.no_grad()
def inputs_of(model: Any, tokens: Tensor, names: dict[str, float]) -> dict[str, Tensor]:
    """What each linear reads in one forward pass, ``[windows, tokens, in]``."""
    read: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: read.update(
                {name: args[0].reshape(len(tokens), tokens.shape[1], -1)}
            )
        )
        for name in names
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return read


@pytest.fixture
def tokens_given(make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Runs calibrate on these tokens, not on those of a dataset."""
    tokens = make_tokens(4, 20)
    monkeypatch.setattr(
        "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
    )
    return tokens


ALGORITHMS = ("rtn", "gptq", "awq", "smoothquant", "osplus", "smoothquant+gptq", "awq+gptq")


@pytest.mark.parametrize("scheme", ["FP8", "W8A8_STATIC"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_takes_static_schemes(
    algo: str, scheme: str, family: Family, tokens_given: Tensor, tmp_path: Path
) -> None:
    out = qplug.quantize(
        str(family("llama")),
        tmp_path / "out",
        algo=algo,
        scheme=scheme,
        backend="compressed-tensors",
        algorithm_options={n: OPTIONS[n] for n in algo.split("+") if n in OPTIONS},
        device="cpu",
    )
    assert max(out.losses.values()) < 0.2
    folder = open_folder(str(out.out), Session.alone())
    read = folder.checkpoint.read
    for block in folder.view.blocks:
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            names = [n for n in folder.schemes if n.startswith(block + ".") and n.endswith(group)]
            assert len({read(f"{name}.input_scale").item() for name in names}) == 1
            if scheme == "FP8":
                assert len({read(f"{name}.weight_scale").item() for name in names}) == 1
    assert qplug.verify(str(out.out)).problems == ()


def test_rounded_to_nearest_under_the_shared_scale(
    family: Family, tokens_given: Tensor, tmp_path: Path
) -> None:
    source = family("llama", torch.bfloat16)
    out = qplug.quantize(
        str(source), tmp_path / "out", scheme="FP8", backend="vllm", device="cpu"
    ).out
    opened, floats = open_folder(str(out), Session.alone()), open_checkpoint(source)
    names = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    weights = {name: floats.read(f"{name}.weight").float() for name in names}
    scale = max(weight.abs().max() for weight in weights.values()) / 448
    for name, weight in weights.items():
        codes = (weight / scale).to(torch.float8_e4m3fn)
        assert torch.equal(opened.dequantized(name), codes.float() * scale)
    down = "model.layers.1.mlp.down_proj"
    alone = round_to_nearest(floats.read(f"{down}.weight"), preset("FP8").weights)
    assert torch.equal(opened.dequantized(down), dequantize(alone))


def test_what_is_needed_is_known_before(tmp_path: Path) -> None:
    """A static scheme reads data with any algorithm, also where it is an exception's alone."""
    nowhere = {"dataset": "text", "dataset_options": {"path": str(tmp_path / "none.txt")}}
    for options in ({"scheme": "FP8"}, {"overrides": {"*.down_proj": "FP8"}}, {"kv_cache": "fp8"}):
        with pytest.raises(QplugError, match=r"none\.txt"):
            qplug.quantize("qplug:demo", tmp_path / "out", backend="vllm", **nowhere, **options)
    qplug.quantize("qplug:demo", tmp_path / "out", backend="vllm", **nowhere)
