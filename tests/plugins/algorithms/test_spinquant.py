"""SpinQuant learns rotations on the whole model, and the float model computes what it did."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
)

import qplug
from qplug import (
    Algorithm,
    FloatModel,
    Preparation,
    QplugError,
    QuantArgs,
    Scheme,
    preset,
)
from qplug.calibration import whole_model as whole_model_module
from qplug.calibration.samples import Samples
from qplug.calibration.whole_model import InMemoryModel, Variant
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.checkpoint.rewritten import apply
from qplug.machine.session import Session
from qplug.model.architectures import by_linear
from qplug.model.hollow import build, load_config
from qplug.model.stacked_experts import with_stacked_experts
from qplug.model.view import model_view
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.rotation import ExplicitRotation, RandomRotation
from qplug.numerics.straight_through import round_inputs
from qplug.numerics.turned_model import rotated_model
from qplug.registry.registry import Registry
from qplug.run.prepare import Prepared, prepare
from qplug_spinquant.spinquant import Params, SpinQuant
from qplug_spinquant.stiefel import CayleySGD, orthogonal

Family = Callable[..., Path]
MakeTokens = Callable[..., Tensor]

#: What float32 may lose, relative to the logits.
RTOL = 1e-5
CPU = torch.device("cpu")
W4A4 = preset("W4A4")

FAMILIES = (
    *("llama", "llama, biases", "llama, one kv head", "llama, all kv heads", "llama, tied"),
    *("qwen2", "qwen3", "mistral", "phi3", "gemma"),
    *("qwen3-moe", "qwen2-moe", "mixtral", "gpt-oss", "deepseek-v3"),
    *("opt", "opt, untied", "opt, gelu", "opt, words of another width", "gpt-neox"),
    *("gpt-neox, in sequence", "phi", "cohere"),
)
#: Tried always. It is quarot's test that tries every family always: they share the rewriting.
FIRST = {"llama, tied", "deepseek-v3", "opt, words of another width"}


def prepared_by(algorithm: Algorithm[Any], folder: Path, learn: Any) -> Prepared:
    source = by_linear(open_checkpoint(folder), Registry([]))
    stages: Any = SimpleNamespace(
        preparing=[algorithm],
        prepare=lambda algorithm, model: algorithm.prepare(model),
        exporter=Registry.installed().exporters.make("fake", {}),
    )
    return prepare(stages, source, model_view(source), Session(Registry([])), learn=learn)


def known(folder: Path) -> FloatModel:
    """What ``prepare`` is told of the model in ``folder``."""
    seen: list[FloatModel] = []

    class Looks(SpinQuant):
        def prepare(self, model: FloatModel) -> Preparation:
            seen.append(model)
            return super().prepare(model)

    prepared_by(Looks(Params()), folder, lambda algorithm, model, source: anything(model))
    return replace(seen[0], learned=None)


def anything(model: FloatModel) -> dict[str, Tensor]:
    """Rotations as they might be learned: another in each layer; the mean stays, if it must."""
    stream = model.stream
    start = RandomRotation(stream.width, 1).matrix()
    if stream.centred:
        descent = CayleySGD([matrix := torch.eye(stream.width, dtype=torch.float64)], 0.5)
        descent.param_groups[0]["fixed"] = torch.ones(stream.width, dtype=torch.float64)
        for seed in range(4):
            matrix.grad = RandomRotation(stream.width, seed).matrix()
            descent.step()
        start = matrix
    heads = {
        each.values: RandomRotation(each.size, seed).matrix()
        for seed, each in enumerate(stream.heads)
    }
    return {"R1": start, **heads, "losses": torch.tensor([2.0, 1.5])}


def held(
    folder: Path, tokens: Tensor, scheme: Scheme | None = W4A4, **options: Any
) -> InMemoryModel:
    source = by_linear(open_checkpoint(folder), Registry([]))
    view = model_view(source)
    schemes = dict.fromkeys(view.quantizable, scheme) if scheme else {}
    return InMemoryModel(source, view, schemes, Samples(tokens), Session(Registry([])), **options)


def reference(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """``KL(wanted || found)`` of logits ``[tokens, vocabulary]``, the mean over tokens."""
    p, q = (x.softmax(-1) for x in (wanted, found))
    return (p * (p / q).log()).sum(-1).mean()


# --- descent on the orthogonal matrices ----------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(2, 40), st.floats(0.001, 1.0), st.booleans(), st.integers(0, 2**20))
@example(3, 0.3, True, 1906)  # where next to nothing is left to turn
@example(3, 1.0, True, 166)
def test_steps_stay_orthogonal(size: int, lr: float, keeps: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.eye(size)
    row = torch.ones(size) if keeps else None
    descent = CayleySGD([{"params": [q], "fixed": row}], lr)
    for _ in range(20):
        q.grad = torch.randn(size, size, generator=generator)
        descent.step()
    torch.testing.assert_close(q @ q.T, torch.eye(size), rtol=0, atol=1e-5)
    if row is not None:
        torch.testing.assert_close(row @ q, row, rtol=0, atol=1e-5)
    exact = orthogonal(q)
    torch.testing.assert_close(exact @ exact.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(exact.float(), q, rtol=0, atol=1e-5)


def test_a_step_is_the_textbooks() -> None:
    """``Q' = (I + t/2 W)⁻¹ (I - t/2 W) Q`` with ``W = G Qᵀ - Q Gᵀ`` (2002.01113, equation 2)."""
    size, lr = 6, 0.3
    start = RandomRotation(size, 0).matrix()
    gradient = torch.randn(size, size, generator=torch.Generator().manual_seed(1)).double()
    q = start.clone()
    q.grad = gradient
    CayleySGD([q], lr, momentum=0.0).step()
    w = gradient @ start.T - start @ gradient.T
    half = w * lr / 2 * size**0.5 / w.norm()
    one = torch.eye(size).double()
    torch.testing.assert_close(q, torch.linalg.inv(one + half) @ (one - half) @ start)


def test_descent_finds_the_nearest_rotation() -> None:
    """Of ``||A Q - B||`` it is known: that of the polar decomposition of ``Aᵀ B`` (Procrustes)."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 8, generator=generator).double()
    wanted = RandomRotation(8, 5).matrix()
    wanted[0] *= torch.linalg.det(wanted).sign()  # Cayley's map turns, it does not mirror
    q = torch.eye(8).double().requires_grad_()
    descent = CayleySGD([q], 0.3, momentum=0.5)
    for step in range(200):
        descent.param_groups[0]["lr"] = 0.3 * (1 - step / 200)
        descent.zero_grad()
        (a @ q - a @ wanted).square().sum().backward()
        descent.step()
    torch.testing.assert_close(q.detach(), wanted, rtol=0, atol=0.02)


# --- the model as a whole ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_the_float_model_computes_what_it_did(
    name: str, family: Family, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    """With whatever might be learned, in the whole model in memory and as it is written."""
    folder, tokens = family(name), make_tokens(2, 12)
    model = known(folder)
    learned = anything(model)
    made = SpinQuant(Params()).prepare(replace(model, learned=learned))
    with torch.no_grad():
        wanted = reference(folder)(tokens).logits
        found = held(folder, tokens).predictions(Variant(made, inputs=False), {"input_ids": tokens})
    torch.testing.assert_close(found, wanted.log_softmax(-1), rtol=1e-4, atol=1e-4)

    prepared = prepared_by(SpinQuant(Params()), folder, lambda *_: learned)
    out = tmp_path / "out"
    out.mkdir()
    tensors = {n: prepared.checkpoint.read(n) for n in prepared.checkpoint.tensors}
    hollow = build(load_config(folder, trust_remote_code=False), folder, trust_remote_code=False)
    tensors = with_stacked_experts(hollow, tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(prepared.checkpoint.config))
    with torch.no_grad():
        logits = reference(out)(tokens).logits
    assert float((logits - wanted).norm() / wanted.norm()) <= RTOL


@pytest.mark.parametrize("name", ["llama, tied", "opt", "mixtral"])
def test_gradients_are_those_of_the_plain_model(
    name: str, family: Family, make_tokens: MakeTokens
) -> None:
    """Blocks that are computed twice give what a model gives that is kept as a whole."""
    folder, tokens = family(name), make_tokens(3, 10)
    tokens[1, 6:] = -1  # a sample that has ended
    model = known(folder)
    stream = model.stream
    start = {n: q.float() for n, q in anything(model).items() if n != "losses"}
    args = QuantArgs("int8", "token", dynamic=True)
    whole = held(folder, tokens, Scheme("w8a8", QuantArgs("int8", "channel"), args))

    def made(of: Mapping[str, Tensor]) -> Preparation:
        heads = {each.values: ExplicitRotation(of[each.values]) for each in stream.heads}
        return rotated_model(stream, ExplicitRotation(of["R1"]), heads)

    one = {n: q.clone().requires_grad_() for n, q in start.items()}
    found = whole.loss(made(one), 0)
    found.backward()

    other = {n: q.clone().requires_grad_() for n, q in start.items()}
    source = open_checkpoint(folder)
    stored = {n: source.read(n) for n in source.tensors}
    plain = whole._model  # as on disk: experts one by one
    for block in model.view.blocks:
        parent, _, local = block.rpartition(".")
        setattr(plain.get_submodule(parent), local, plain.get_submodule(block).__dict__["block"])
    for linear in model.view.quantizable:
        plain.get_submodule(linear).register_forward_pre_hook(
            lambda module, inputs: (round_inputs(inputs[0], args, through_peaks=True),)
        )
    values = apply(made(other), stored)
    logits = functional_call(
        plain, values, (tokens.clamp(min=0),), {"use_cache": False}, tie_weights=False
    ).logits
    with torch.no_grad():
        floats = reference(folder)(tokens.clamp(min=0)).logits
    real = tokens >= 0
    wanted = divergence(floats[real], logits[real])
    wanted.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)
    for key, q in other.items():
        assert q.grad is not None
        torch.testing.assert_close(one[key].grad, q.grad, rtol=1e-2, atol=1e-6)


def test_batches_and_what_is_not_rounded(family: Family, make_tokens: MakeTokens) -> None:
    folder, tokens = family("llama"), make_tokens(5, 8)
    whole = held(folder, tokens, batch_size=2)
    assert whole.count == 3
    plain = Preparation({})
    model = qplug.load(str(folder))
    with torch.no_grad():
        floats = model(tokens[2:4]).logits
        for module in (
            model.get_submodule(name) for name in model_view(open_checkpoint(folder)).quantizable
        ):
            module.register_forward_pre_hook(
                lambda module, inputs: (fake_quantize_activations(inputs[0], W4A4.activations),)
            )
        wanted = divergence(floats, model(tokens[2:4]).logits)
        torch.testing.assert_close(whole.loss(plain, 1), wanted, rtol=1e-3, atol=0)
        assert float(held(folder, tokens, None, batch_size=2).loss(plain, 1)) < 1e-6 < wanted


def test_a_tied_head_that_stays_tied(family: Family, make_tokens: MakeTokens) -> None:
    folder, tokens = family("llama, tied"), make_tokens(2, 8)
    with torch.no_grad():
        wanted = reference(folder)(tokens).logits.log_softmax(-1)
        found = held(folder, tokens).predictions(
            Variant(Preparation({}), inputs=False), {"input_ids": tokens}
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_blocks_that_are_called_with_positional_arguments(
    family: Family, make_tokens: MakeTokens
) -> None:
    folder, tokens = family("gpt2"), make_tokens(2, 8)
    with torch.no_grad():
        wanted = reference(folder)(tokens).logits.log_softmax(-1)
        found = held(folder, tokens, None).predictions(
            Variant(Preparation({}), inputs=False), {"input_ids": tokens}
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_fit(
    family: Family, make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_model_module, "_free_bytes", lambda device: 1000)
    with pytest.raises(QplugError, match=r"whole model.*GiB.*cpu has 0\.0 GiB free; take another"):
        held(family("llama"), make_tokens(2, 8))


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, and three channels of the stream that stand out."""
    folder = tmp_path_factory.mktemp("spinquant") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)[:, :3] *= 10
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / name, folder)
    return folder


def quantize(source: Path, out: Path, algo: str = "spinquant", **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "scheme": "W4A4",
        "backend": "fake",
        "device": "cpu",
        "samples": 8,
        "seq_len": 16,
        "batch_size": 2,
        "algorithm_options": {"spinquant": {"steps": 10, "lr": 0.05}},
    }
    return qplug.quantize(str(source), out, algo=algo, **{**defaults, **options})


def losses(notes: tuple[str, ...]) -> tuple[float, ...]:
    (note,) = [note for note in notes if note.startswith("spinquant: divergence")]
    found = re.fullmatch(r".*: (\S+), after learning (\S+)", note)
    assert found is not None
    return tuple(map(float, found.groups()))


@pytest.mark.parametrize("algo", ["spinquant", "spinquant+gptq"])
@pytest.mark.slow
def test_less_is_lost(algo: str, small: Path, tmp_path: Path) -> None:
    result = quantize(small, tmp_path / "out", algo)
    before, after = losses(result.notes)
    assert 0 < after < before
    assert any("no longer tied" in note for note in result.notes)
    manifest = json.loads((tmp_path / "out" / "qplug.json").read_text())
    assert losses(tuple(manifest["notes"])) == (before, after)


def test_steps_that_make_it_worse_are_not_kept(small: Path, tmp_path: Path) -> None:
    wild = {"spinquant": {"steps": 3, "lr": 1.0, "momentum": 0.0}}
    before, after = losses(quantize(small, tmp_path / "out", algorithm_options=wild).notes)
    assert after <= before


def test_the_float_model_once_learned(small: Path, tmp_path: Path) -> None:
    """The exporter of float models writes it, rotated."""
    quantize(small, tmp_path / "out", backend="hf")
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        wanted, found = (reference(each)(tokens).logits for each in (small, tmp_path / "out"))
    assert float((found - wanted).norm() / wanted.norm()) <= RTOL
    words = "model.embed_tokens.weight"
    one, other = (open_checkpoint(each).read(words) for each in (small, tmp_path / "out"))
    assert float((one - other).norm() / one.norm()) > 0.5


@pytest.mark.slow
def test_a_killed_run_does_not_learn_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    quantize(small, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quantize(small, tmp_path / "out", watch=stop)
    monkeypatch.setattr(SpinQuant, "learn_rewrite", lambda *_: pytest.fail("learns again"))
    assert quantize(small, tmp_path / "out").resumed > 0
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_another_run_learns_anew(small: Path, tmp_path: Path) -> None:
    """What an unfinished run with other options has learned is not taken."""

    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(small, tmp_path / "out", watch=stop)
    options = {"spinquant": {"steps": 2, "lr": 0.01}}
    again = quantize(small, tmp_path / "out", overwrite=True, algorithm_options=options)
    fresh = quantize(small, tmp_path / "fresh", algorithm_options=options)
    assert losses(again.notes) == losses(fresh.notes)


def test_what_rounds_no_inputs_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="spinquant: learns from the errors of rounded inputs"):
        quantize(small, tmp_path / "out", scheme="W4A16")
    assert not list(tmp_path.iterdir())


def test_a_model_that_ranks_is_refused(family: Family, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(family("qwen3"), num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "ranking")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / name, tmp_path / "ranking")
    with pytest.raises(QplugError, match="spinquant learns from predictions of the next token"):
        quantize(tmp_path / "ranking", tmp_path / "out", dry_run=True)


def test_nothing_is_learned_by_a_dry_run(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpinQuant, "learn_rewrite", lambda *_: pytest.fail("learns"))
    quantize(small, tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
