"""What a calibrated run cannot work with is refused by name; what is merely odd goes through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import qplug
from qplug import Block, InputGroup, Linear, QplugError, QuantArgs
from qplug.api.events import Result
from qplug.api.groups import dequantize
from qplug.calibration.samples import Samples
from qplug_awq.awq import AWQ
from qplug_awq.awq import Params as AWQParams
from qplug_gptq.gptq import GPTQ
from qplug_gptq.gptq import Params as GPTQParams

Family = Callable[..., Path]
MakeTokens = Callable[..., Tensor]
MakeInputs = Callable[..., Tensor]
MakeLinear = Callable[..., Linear]
MakeGroup = Callable[..., InputGroup]
Run = Callable[..., Result]

ALGORITHMS = ("awq", "gptq", "awq+gptq", "smoothquant", "osplus")


@pytest.fixture
def run(tmp_path: Path, make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Quantizes to ``tmp_path / "out"``, calibrated on random tokens."""
    tokens = make_tokens(4, 12)
    monkeypatch.setattr(
        "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
    )

    def quantized(model: Path, algo: str, **changes: Any) -> Result:
        options: dict[str, Any] = {"backend": "compressed-tensors", "device": "cpu"}
        # What smooths inputs is for schemes that round them.
        smooths = algo in ("smoothquant", "osplus")
        options |= {"scheme": "W8A8"} if smooths else {"group_size": 16}
        used = {"algorithm_options": {"awq": {"ratios": 2}}} if "awq" in algo else {}
        return qplug.quantize(str(model), tmp_path / "out", algo=algo, **options, **used, **changes)

    return quantized


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of ``source`` with other tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# --- values that are none -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.self_attn.q_proj.bias",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
)
@pytest.mark.parametrize("algo", ["awq", "gptq"])
def test_a_tensor_that_is_not_finite_is_named(
    algo: str, name: str, bad: float, tmp_path: Path, family: Family, run: Run
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = bad

    model = changed(family("qwen2", torch.bfloat16), tmp_path / "model", spoil)
    with pytest.raises(
        QplugError, match=rf"^{name}: has NaN or infinite values; mend the float model$"
    ):
        run(model, algo)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing is left behind


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_names_it(algo: str, tmp_path: Path, family: Family, run: Run) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 5] = float("nan")

    model = changed(family("llama"), tmp_path / "model", spoil)
    with pytest.raises(
        QplugError, match=f"^{name}: has NaN or infinite values; mend the float model$"
    ):
        run(model, algo)


def test_weights_too_large_for_what_they_compute(tmp_path: Path, family: Family, run: Run) -> None:
    """Each is finite; what comes out of them is not."""

    def grow(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "mlp.up_proj" in name or "mlp.gate_proj" in name:
                tensors[name] *= 1e25

    model = changed(family("llama"), tmp_path / "model", grow)
    with pytest.raises(QplugError, match=r"^model\.layers\.0.*too large to compute with"):
        run(model, "gptq")


# --- models and data ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "nowhere"}, "nowhere"),
        ({"dataset": "text"}, "needs the option path"),
        ({"dataset": "text", "dataset_options": {"path": "/nowhere/text.txt"}}, "/nowhere/text"),
        ({"dataset": "demo", "dataset_options": {"path": "text.txt"}}, "has no option 'path'"),
        ({"seq_len": 65}, "--seq-len 65: the model takes 64 tokens at most"),
        ({"seq_len": 0}, "must be at least 1"),
        ({"samples": 0}, "must be at least 1"),
        ({"propagate": "both"}, "must be one of quantized, float"),
    ],
)
def test_data_that_cannot_be_had_is_said_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path, family: Family
) -> None:
    with pytest.raises(QplugError, match=message):
        qplug.quantize(
            str(family("llama")),
            tmp_path / "out",
            algo="awq",
            group_size=16,
            backend="compressed-tensors",
            device="cpu",
            **{"seq_len": 20, **options},
        )
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_too_short(tmp_path: Path, family: Family) -> None:
    (tmp_path / "text.txt").write_text("A few words.")
    with pytest.raises(QplugError, match="fewer than one window of 60"):
        qplug.quantize(
            str(family("llama")),
            tmp_path / "out",
            algo="gptq",
            group_size=16,
            backend="compressed-tensors",
            dataset="text",
            dataset_options={"path": str(tmp_path / "text.txt")},
            seq_len=60,
            device="cpu",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path, family: Family) -> None:
    model = changed(
        family("llama"),
        tmp_path / "model",
        lambda tensors: tensors.update(
            {
                name: tensors[name][:200].clone()
                for name in ("model.embed_tokens.weight", "lm_head.weight")
                if name in tensors
            }
        ),
    )
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(QplugError, match="which the model does not have"):
        qplug.quantize(
            str(model),
            tmp_path / "out",
            algo="gptq",
            group_size=16,
            backend="compressed-tensors",
            seq_len=20,
            device="cpu",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- what is odd, and goes through ----------------------------------------------------------------


def test_tensors_in_blocks_that_are_no_parameters(tmp_path: Path, family: Family, run: Run) -> None:
    """As old checkpoints of GPT-NeoX have: they are kept as they are, killed or not."""
    extra = {
        "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.rand(8),
    }
    model = changed(family("gpt-neox"), tmp_path / "model", lambda tensors: tensors.update(extra))

    def stop(done: int, *_: object) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, "gptq", watch=stop)
    result = run(model, "gptq")
    assert result.resumed > 0
    stored = load_file(result.out / "model.safetensors")
    for name, tensor in extra.items():
        assert torch.equal(stored[name], tensor)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_blocks_that_do_nothing(algo: str, tmp_path: Path, family: Family, run: Run) -> None:
    """Zero weights, and inputs that are zero for the linears behind them."""

    def clear(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layers.1" in name or ("layers.0" in name and "norm" in name):
                tensor.zero_()

    model = changed(family("llama"), tmp_path / "model", clear)
    loaded = qplug.load(str(run(model, algo).out))
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    assert all(
        (parameter == 0).all()
        for name, parameter in loaded.named_parameters()
        if "layers.1" in name
    )


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize(("samples", "length"), [(1, 1), (3, 1)])
def test_few_tokens(
    algo: str,
    samples: int,
    length: int,
    family: Family,
    run: Run,
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = make_tokens(samples, length)
    monkeypatch.setattr(
        "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
    )
    result = run(family("llama"), algo)
    assert all(0 < error < 0.5 for error in result.errors.values())
    assert all(p.isfinite().all() for p in qplug.load(str(result.out)).parameters())


def test_tokens_that_are_all_the_same(
    family: Family, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.full((4, 12), 7)
    monkeypatch.setattr(
        "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
    )
    result = run(family("llama"), "awq+gptq")
    assert all(p.isfinite().all() for p in qplug.load(str(result.out)).parameters())


GRIDS = {
    "int4 groups": QuantArgs("int4", "group", 4),
    "int4 groups, asymmetric": QuantArgs("int4", "group", 4, symmetric=False),
    "int8 channels": QuantArgs("int8", "channel"),
    "e4m3 channels": QuantArgs("e4m3", "channel"),
    "e4m3 blocks": QuantArgs("e4m3", "block", block=(8, 8)),
}


class Unscaled(Block):
    """A block in which scale is thrown away."""

    def shared(self, group: InputGroup, per_channel: Tensor) -> Tensor:
        return per_channel

    def smooth(self, group: InputGroup, scale: Tensor) -> None:
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(GRIDS)),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(1, 30),
    st.sampled_from(["random", "constant", "one channel", "zero", "huge", "tiny"]),
    st.sampled_from(["random", "zero rows", "zero", "all alike", "huge", "tiny"]),
    st.sampled_from(["v1", "v2"]),
    st.sampled_from([None, "int8", "e4m3"]),
    st.integers(0, 2**20),
)
def test_any_shape_and_kind_of_input(
    make_inputs: MakeInputs,
    make_linear: MakeLinear,
    make_group: MakeGroup,
    grid: str,
    rows: int,
    quarters: int,
    tokens: int,
    inputs: str,
    weights: str,
    version: Any,
    activations: str | None,
    seed: int,
) -> None:
    """Scales are positive, codes finite and within a step or two of the weight."""
    width = 4 * quarters
    rounded = None if activations is None else QuantArgs(activations, "token", dynamic=True)
    x = make_inputs(tokens, width, seed)
    linear = make_linear(rows, width, GRIDS[grid], activations=rounded, seed=seed)
    if inputs == "constant":
        x[:] = x[0]
    elif inputs == "one channel":
        x[:, 1:] = 0
    x *= {"zero": 0.0, "huge": 1e6, "tiny": 1e-6}.get(inputs, 1.0)
    if weights == "zero rows":
        linear.weight[::2] = 0
    elif weights == "all alike":
        linear.weight[:] = -0.25
    linear.weight *= {"zero": 0.0, "huge": 1e6, "tiny": 1e-6}.get(weights, 1.0)
    block = Unscaled("block", (linear,), (make_group(x, linear),))
    AWQ(AWQParams(ratios=3, version=version, clip_steps=3, clip_in_search=2)).transform(block)
    assert linear.scale is None or (linear.scale > 0).all()
    (made,) = GPTQ(GPTQParams()).quantize(block).values()
    values = dequantize(made)
    assert values.isfinite().all()
    assert (made.scale > 0).all()
    zeros = (linear.weight == 0).all(1)
    if not GRIDS[grid].block:
        assert (values[zeros] == 0).all()
    # What a row's errors push about stays within reach of its largest weight.
    reach = 2 * linear.weight.abs().amax(1, keepdim=True) + 1e-30
    if not GRIDS[grid].block:
        assert (values.abs() <= reach).all()
