"""QuaRot turns the residual stream and the heads, and the float model computes what it did."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewritten_models import reference, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
)
from zoo.make import make

import qplug
from qplug import Algorithm, FloatModel, NoParams, Preparation, QplugError, Rewrite
from qplug.calibration.samples import Samples
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.checkpoint.rewritten import RewrittenTensor
from qplug.checkpoint.tensor_file import StoredTensor
from qplug.machine.session import Session
from qplug.model.architectures import by_linear
from qplug.model.hollow import build, load_config
from qplug.model.online_rotation import rotate_inputs
from qplug.model.stacked_experts import with_stacked_experts
from qplug.model.view import model_view
from qplug.numerics.hadamard import hadamard_matrix
from qplug.numerics.rotation import HadamardRotation, KeepingMean, RandomRotation, Rotation
from qplug.recipe.recipe import Recipe
from qplug.recipe.spellings import parse_scheme
from qplug.registry.registry import Registry
from qplug.run.prepare import Prepared, prepare, with_float_experts_stacked
from qplug.run.stages import Stages
from qplug_quarot.quarot import Params, QuaRot

Family = Callable[..., Path]
Contents = Callable[[Path], dict[str, bytes | None]]

#: What float32 may lose, relative to the logits.
RTOL = 1e-5

RMS = (
    *("llama", "llama, biases", "llama, one kv head", "llama, all kv heads", "llama, tied"),
    *("qwen2", "qwen3", "mistral", "phi3", "gemma"),
)
MIXTURES = ("qwen3-moe", "qwen2-moe", "mixtral", "gpt-oss", "deepseek-v3")
CENTRED = (
    *("opt", "opt, untied", "opt, gelu", "opt, words of another width", "gpt-neox"),
    *("gpt-neox, in sequence", "phi", "cohere", "gpt2"),
)
TIED = {
    *("llama, tied", "gemma", "opt", "opt, gelu", "opt, words of another width", "cohere", "gpt2")
}
#: Families whose values cannot be told from the rest of a matrix.
HEADLESS = {"deepseek-v3"}
#: Families that are refused, and what is said of them.
REFUSED = {
    "gemma2": "model.layers.0: cannot be rotated: no linear reads the output of "
    "post_attention_layernorm and post_feedforward_layernorm",
    "gemma3": "model.layers.0: cannot be rotated: no linear reads the output of "
    "post_attention_layernorm and post_feedforward_layernorm",
    "olmo2": "model.embed_tokens.weight: more than norms read what it writes",
    "bloom": "transformer.h.0: cannot be rotated: no linear reads the output of "
    "transformer.word_embeddings_layernorm",
    "opt, norm after": "model.decoder.embed_tokens.weight: more than norms read what it writes",
}


def stages(algo: str = "quarot", backend: str = "fake", **options: Any) -> Stages:
    recipe = Recipe(
        tuple(algo.split("+")),
        parse_scheme("W8A8"),
        backend,
        algorithm_options={"quarot": options},
    )
    return Stages(recipe, Session(Registry.installed()))


def rotated(folder: Path, **options: Any) -> Prepared:
    source = by_linear(open_checkpoint(folder), Registry([]))
    return prepare(stages(**options), source, model_view(source), Session(Registry([])))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(3, 4096, (3, 24), generator=torch.Generator().manual_seed(0))
    found: Tensor = model(tokens).logits
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# --- rotations -----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.sampled_from([HadamardRotation, RandomRotation]),
    st.sampled_from([2, 4, 12, 24, 64, 96]),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_rotations_are_orthogonal(
    kind: Callable[[int, int], Rotation], size: int, keeps_mean: bool, seed: int
) -> None:
    rotation = kind(size, seed)
    if keeps_mean:
        rotation = KeepingMean(rotation)
    q = rotation.turn(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64))
    if keeps_mean:
        torch.testing.assert_close(q.sum(0), torch.ones(size, dtype=torch.float64))
    x = torch.randn(3, size, 5, generator=torch.Generator().manual_seed(seed))
    wanted = torch.einsum("aib,ij->ajb", x.double(), q)
    torch.testing.assert_close(rotation.along(x, 1).double(), wanted, rtol=1e-4, atol=1e-5)


def test_seeds_differ_and_are_kept() -> None:
    x = torch.eye(24)
    for kind in (HadamardRotation, RandomRotation):
        assert torch.equal(kind(24, 1).turn(x), kind(24, 1).turn(x))
        assert not torch.equal(kind(24, 1).turn(x), kind(24, 2).turn(x))
    signs = HadamardRotation(24, 1).turn(x) * math.sqrt(24) / torch.from_numpy(hadamard_matrix(24))
    torch.testing.assert_close(signs.abs(), torch.ones(24, 24))
    torch.testing.assert_close(signs, signs[:, :1].expand(-1, 24))


# --- what the float model computes ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rotation"),
    [
        *((name, "hadamard") for name in (*RMS, *MIXTURES, *CENTRED)),
        *((name, "random") for name in ("llama, tied", "opt")),
        *(
            pytest.param(name, "random", marks=pytest.mark.slow)
            for name in ("qwen2", "mixtral", "gpt-neox")
        ),
    ],
)
def test_the_float_model_computes_what_it_did(
    name: str, rotation: str, family: Family, tmp_path: Path
) -> None:
    source = family(name)
    prepared = rotated(source, rotation=rotation)
    found = logits(reference(save(prepared, tmp_path / "out")))
    assert distance(found, logits(reference(source))) <= RTOL

    tied = name in TIED
    if tied:
        assert prepared.checkpoint.config["tie_word_embeddings"] is False
    else:
        assert prepared.checkpoint.config == open_checkpoint(source).config
    assert any("no longer tied" in note for note in prepared.notes) == tied
    assert any("no heads" in note for note in prepared.notes) == (name in HEADLESS)


@pytest.mark.parametrize("name", ["bitnet", "mistral4"])
def test_norms_as_wide_as_the_stream_that_do_not_read_it(name: str, tmp_path: Path) -> None:
    """Those of attended or latent values, whose readers are not rotated."""
    source = make(name, tmp_path / "model")
    prepared = rotated(source)
    found = logits(reference(save(prepared, tmp_path / "out")))
    assert distance(found, logits(reference(source))) <= RTOL


@pytest.mark.parametrize("name", ["aria_text", "granitemoe"])
def test_float_experts_are_stacked_again(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "model")
    apart = rotated(source)
    config = load_config(source, trust_remote_code=False)
    hollow = build(config, source, trust_remote_code=False)
    each = {tensor: apart.checkpoint.read(tensor) for tensor in apart.checkpoint.tensors}
    wanted = with_stacked_experts(hollow, each)
    found = with_float_experts_stacked(apart, set()).checkpoint
    assert found.tensors.keys() == wanted.keys() == open_checkpoint(source).tensors.keys()
    for tensor, stored in found.tensors.items():
        assert torch.equal(stored.read(), wanted[tensor])
        written = torch.frombuffer(bytearray(b"".join(stored.chunks())), dtype=torch.bfloat16)
        assert torch.equal(written, wanted[tensor].bfloat16().flatten())
    quantize(source, tmp_path / "out", ignore=("*.experts.*",))
    assert qplug.verify(str(tmp_path / "out")).problems == ()


#: Who writes into the stream, and who reads which norm of it, in block 0 or outside of blocks.
ROLES: dict[str, tuple[set[str], dict[str, set[str]]]] = {
    "llama": (
        {"model.embed_tokens", "self_attn.o_proj", "mlp.down_proj"},
        {
            "input_layernorm": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
            "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"},
            "model.norm": {"lm_head"},
        },
    ),
    "phi3": (
        {"model.embed_tokens", "self_attn.o_proj", "mlp.down_proj"},
        {
            "input_layernorm": {"self_attn.qkv_proj"},
            "post_attention_layernorm": {"mlp.gate_up_proj"},
            "model.norm": {"lm_head"},
        },
    ),
    "opt, words of another width": (
        {"decoder.project_in", "decoder.embed_positions", "self_attn.out_proj", "fc2"},
        {
            "self_attn_layer_norm": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
            "final_layer_norm": {"fc1"},
            "decoder.final_layer_norm": {"decoder.project_out"},
        },
    ),
    "gpt-neox": (
        {"gpt_neox.embed_in", "attention.dense", "mlp.dense_4h_to_h"},
        {
            "input_layernorm": {"attention.query_key_value"},
            "post_attention_layernorm": {"mlp.dense_h_to_4h"},
            "gpt_neox.final_layer_norm": {"lm_head"},
        },
    ),
    "qwen2-moe": (
        {
            *("model.embed_tokens", "self_attn.o_proj", "mlp.shared_expert.down_proj"),
            *(f"mlp.experts.{expert}.down_proj" for expert in range(4)),
        },
        {
            "input_layernorm": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
            "post_attention_layernorm": {
                *("mlp.gate", "mlp.shared_expert_gate"),
                *("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
                *(f"mlp.experts.{e}.{part}_proj" for e in range(4) for part in ("gate", "up")),
            },
            "model.norm": {"lm_head"},
        },
    ),
}


@pytest.mark.parametrize("name", ROLES)
def test_what_faces_the_stream(name: str, family: Family) -> None:
    """By the names on disk: of every tensor, and of the norm that it reads."""
    source = open_checkpoint(family(name))
    view = model_view(source)
    seen: list[FloatModel] = []
    looks: Any = SimpleNamespace(
        preparing=[QuaRot(Params())],
        exporter=stages().exporter,
        prepare=lambda algorithm, model: seen.append(model) or algorithm.prepare(model),
    )
    prepare(looks, source, view, Session(Registry([])))
    stream = seen[0].stream
    writers, readers = ROLES[name]

    def local(tensor: str) -> str | None:
        """The name within block 0, or that of what is in no block; None for other blocks."""
        tensor = tensor.removesuffix(".weight").removeprefix(f"{view.blocks[0]}.")
        inside = tensor.startswith(tuple(f"{block}." for block in view.blocks))
        return (
            None
            if inside
            else tensor.removeprefix("model.decoder.").replace("embed_out", "lm_head")
        )

    weights = {t: f for t, f in stream.tensors.items() if not t.endswith("bias")}
    found = {local(t) for t, facing in weights.items() if facing.norm is None}
    assert found - {None} == {w.removeprefix("decoder.") for w in writers}
    assert stream.norms.keys() == {f.norm for f in weights.values() if f.norm is not None}
    by_norm = {
        local(norm): {local(reader) for reader in told.readers}
        for norm, told in stream.norms.items()
    }
    if name.startswith("opt"):  # the last norm is called what each block's last one is
        by_norm["decoder.final_layer_norm"] = {
            local(reader) for reader in stream.norms["model.decoder.final_layer_norm"].readers
        }
        block = stream.norms["model.decoder.layers.0.final_layer_norm"]
        by_norm["final_layer_norm"] = {local(reader) for reader in block.readers}
    by_norm.pop(None, None)
    assert by_norm == {
        norm: {reader.removeprefix("decoder.") for reader in told} for norm, told in readers.items()
    }
    # Every block has what block 0 has.
    blocks = len(view.blocks)
    inside = [n for n in weights if n.startswith(tuple(f"{block}." for block in view.blocks))]
    assert len(inside) == blocks * sum(n.startswith(f"{view.blocks[0]}.") for n in inside)


def test_outliers_are_spread(tmp_path: Path, family: Family) -> None:
    """One channel of the stream that is a hundred times the others is not, in the new basis."""
    tensors = load_file(family("llama") / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 5] *= 100
    source = Path(shutil.copytree(family("llama"), tmp_path / "model"))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    before = tensors["model.embed_tokens.weight"]
    after = rotated(source).checkpoint.read("model.embed_tokens.weight")
    assert float(before.abs().amax() / before.square().mean().sqrt()) > 25
    assert float(after.abs().amax() / after.square().mean().sqrt()) < 8


def test_twice_is_a_rotation_too(family: Family, tmp_path: Path) -> None:
    """What an algorithm rewrote is rewritten by the next."""
    source = open_checkpoint(family("llama, tied"))
    one, other = QuaRot(Params()), QuaRot(Params(rotation="random", seed=3))
    both: Any = SimpleNamespace(
        preparing=[one, other],
        exporter=stages().exporter,
        prepare=lambda algorithm, model: algorithm.prepare(model),
    )
    prepared = prepare(both, source, model_view(source), Session(Registry([])))
    assert len(prepared.notes) == 1  # untied once
    found = logits(reference(save(prepared, tmp_path / "out")))
    assert distance(found, logits(reference(family("llama, tied")))) <= RTOL


def test_rows_at_a_time(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are made in pieces: the same numbers, and no more of them than that at once."""
    whole = rotated(family("llama, tied")).checkpoint
    wanted = {n: b"".join(tensor.chunks()) for n, tensor in whole.tensors.items()}
    monkeypatch.setattr("qplug.checkpoint.rewritten._CHUNK", {"cpu": 1000})
    for name, tensor in rotated(family("llama, tied")).checkpoint.tensors.items():
        pieces = list(tensor.chunks())
        # A product of other sizes is summed in another order.
        found, old = (
            torch.frombuffer(bytearray(b), dtype=torch.float32)
            for b in (b"".join(pieces), wanted[name])
        )
        torch.testing.assert_close(found, old)
        if "embed" in name or "lm_head" in name:
            assert max(map(len, pieces)) <= 4 * 1000
        torch.testing.assert_close(tensor.read(), whole.read(name))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_turned(name: str, family: Family, tmp_path: Path) -> None:
    with pytest.raises(QplugError) as caught:
        qplug.quantize(
            str(family(name)), tmp_path / "out", algo="quarot", scheme="W8A8", backend="fake"
        )
    assert REFUSED[name] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def llama(folder: Path, **changes: Any) -> Path:
    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **changes}))
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / name, folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "width"), [({"hidden_size": 188}, 188), ({"head_dim": 22}, 22)]
)
def test_a_width_without_a_matrix(changes: dict[str, int], width: int, tmp_path: Path) -> None:
    source = llama(tmp_path / "model", **changes)
    with pytest.raises(QplugError, match=rf"width {width}; use -o quarot.rotation=random"):
        rotated(source)
    prepared = rotated(source, rotation="random")
    assert any(isinstance(t, RewrittenTensor) for t in prepared.checkpoint.tensors.values())


@pytest.mark.parametrize("algo", ["awq+quarot", "rtn+quarot", "smoothquant+quarot+gptq"])
def test_what_comes_before(algo: str, tmp_path: Path, family: Family) -> None:
    with pytest.raises(QplugError, match="quarot rewrites the float model, so it comes before"):
        qplug.quantize(str(family("llama")), tmp_path / "out", algo=algo, scheme="W8A8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["sglang", "vllm", "compressed-tensors"])
def test_engines_do_not_rotate(backend: str, tmp_path: Path, family: Family) -> None:
    options = {"quarot": {"online": True}}
    with pytest.raises(QplugError, match=f"{backend}: does not rotate inputs of linears"):
        qplug.quantize(
            str(family("llama")),
            tmp_path / "out",
            algo="quarot",
            scheme="W8A8",
            backend=backend,
            algorithm_options=options,
        )
    assert not list(tmp_path.iterdir())


def test_experts_are_not_rotated_as_they_run(family: Family) -> None:
    with pytest.raises(QplugError, match=r"experts\.0\.down_proj: .* it is fused"):
        rotated(family("qwen3-moe"), online=True)


class Wrong(Algorithm[NoParams]):
    """Turns the embedding alone."""

    name = "wrong"

    def prepare(self, model: FloatModel) -> Preparation:
        turn = HadamardRotation(model.stream.width, 0).turn
        return Preparation(
            {"model.embed_tokens.weight": Rewrite(("model.embed_tokens.weight",), turn)}
        )


@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen3", "gpt2", "gpt-neox"])
def test_a_model_that_ranks_computes_what_it_did(name: str, family: Family, tmp_path: Path) -> None:
    """Its head reads the stream as one of words does; config.json may say that words are tied."""
    config = AutoConfig.from_pretrained(family(name), pad_token_id=0, num_labels=3)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "ranking")
    prepared = rotated(tmp_path / "ranking")
    assert prepared.checkpoint.config == open_checkpoint(tmp_path / "ranking").config
    assert isinstance(prepared.checkpoint.tensors["score.weight"], RewrittenTensor)
    turned = reference(save(prepared, tmp_path / "out"))
    assert distance(logits(turned), logits(model)) <= RTOL


def test_a_rewrite_that_changes_what_is_computed_is_refused(family: Family) -> None:
    source = open_checkpoint(family("llama"))
    wrong: Any = SimpleNamespace(
        preparing=[Wrong(NoParams())],
        exporter=stages().exporter,
        prepare=lambda algorithm, model: algorithm.prepare(model),
    )
    with pytest.raises(QplugError, match=r"wrong: model\.layers\.0: cannot be rotated"):
        prepare(wrong, source, model_view(source), Session(Registry([])))


# --- whole runs ----------------------------------------------------------------------------------


def quantize(
    source: Path, out: Path, algo: str = "quarot+rtn", **options: Any
) -> qplug.run.quantize.Result:
    defaults: dict[str, Any] = {"scheme": "W8A8", "device": "cpu"}
    return qplug.quantize(str(source), out, algo=algo, **{**defaults, **options})


@pytest.fixture(autouse=True)
def random_tokens(make_tokens: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """To calibrate on, in the place of text."""
    tokens = make_tokens(4, 32)
    monkeypatch.setattr(
        "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
    )


@pytest.mark.parametrize(
    ("algo", "tied"),
    [
        *(("quarot+rtn", True), ("quarot", False), ("quarot+gptq", True), ("quarot+gptq", False)),
        *(("quarot+awq", True), ("quarot+smoothquant", False)),
    ],
)
def test_runs(algo: str, tied: bool, tmp_path: Path) -> None:
    source = llama(tmp_path / "model", tie_word_embeddings=tied)
    result = quantize(source, tmp_path / "out", algo)
    out = result.out
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head" in config["quantization_config"]["ignore"]
    assert result.bytes == sum(t.nbytes for t in open_checkpoint(out).tensors.values())
    verified = qplug.verify(str(out))
    assert verified.problems == ()
    assert verified.rewritten == verified.linears == 14
    near = logits(qplug.load(str(out)))
    assert distance(near, logits(reference(source))) < 0.05
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    unrounded = qplug.load(str(out), quantize_activations=False)
    for name, parameter in theirs.named_parameters():
        if "norm" in name or "embed" in name or "lm_head" in name:
            torch.testing.assert_close(parameter, unrounded.get_parameter(name))


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_experts(name: str, family: Family, tmp_path: Path) -> None:
    out = quantize(family(name), tmp_path / "out", backend="compressed-tensors").out
    assert qplug.verify(str(out)).problems == ()
    found = logits(qplug.load(str(out), quantize_activations=False))
    wanted = logits(reference(family(name)))
    # Some tokens stand so near the border between two experts that rounding sends them to another,
    # and those behind them see it: most do not.
    apart = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert apart.median() < 0.05


def test_weights_are_not_rounded_on_their_way(tmp_path: Path) -> None:
    """Codes are the nearest of the rotated weight in float64, not of its bfloat16."""
    source = llama(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] += torch.rand(64).to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    stored = load_file(quantize(source, tmp_path / "out").out / "model.safetensors")
    norm = tensors["model.layers.0.input_layernorm.weight"].double()
    q = HadamardRotation(64, 0).turn(torch.eye(64, dtype=torch.float64))
    weight = tensors["model.layers.0.self_attn.q_proj.weight"].double() * norm @ q

    def codes(weight: Tensor) -> Tensor:
        return (weight / (weight.abs().amax(1, keepdim=True) / 127.5)).round().clamp(-128, 127)

    found = stored["model.layers.0.self_attn.q_proj.weight"].double()
    inner = weight.abs() < 0.99 * weight.abs().amax(1, keepdim=True)  # the largest is a tie
    assert (found == codes(weight))[inner].double().mean() > 0.999
    assert (found == codes(weight.to(torch.bfloat16).double()))[inner].double().mean() < 0.97
    assert (stored["model.layers.0.input_layernorm.weight"] == 1).all()


def test_each_linear_is_a_step_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is built, and no more is held than a few linears in float32."""
    source = llama(tmp_path / "model", num_hidden_layers=6, hidden_size=128, intermediate_size=512)
    monkeypatch.setattr("qplug.run.calibrated.Walk", None)
    monkeypatch.setattr("qplug.checkpoint.rewritten._CHUNK", {"cpu": 1 << 14})
    held: dict[int, tuple[weakref.ref[Tensor], int]] = {}
    most = 0

    def watched(method: Any) -> Any:
        def call(self: Any, *args: Any) -> Tensor:
            nonlocal most
            made: Tensor = method(self, *args)
            held[id(made)] = weakref.ref(made), made.nbytes
            most = max(most, sum(size for ref, size in list(held.values()) if ref() is not None))
            return made

        return call

    monkeypatch.setattr(StoredTensor, "read", watched(StoredTensor.read))
    monkeypatch.setattr(RewrittenTensor, "read", watched(RewrittenTensor.read))
    names: list[str] = []
    quantize(source, tmp_path / "out", watch=lambda done, total, name, loss: names.append(name))
    linears = [name for name in names if name.endswith("_proj")]
    assert len(linears) == 6 * 7
    assert len(names) == 6 * 9 + 3
    assert "lm_head.weight" in names
    # The embedding is 4096 x 128 in bfloat16, a large linear 512 x 128 in float32.
    assert most <= 4 * (512 * 128 * 4)


@pytest.mark.parametrize(
    ("algo", "options"),
    [("quarot+rtn", {}), ("quarot+gptq", {}), ("quarot+gptq", {"propagate": "float"})],
)
def test_goes_on_where_it_was_stopped(algo: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = llama(tmp_path / "model", tie_word_embeddings=True)
    whole = quantize(source, tmp_path / "whole", algo, **options)

    def stop(done: int, *_: object) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", algo, watch=stop, **options)
    again = quantize(source, tmp_path / "out", algo, **options)
    assert again.resumed > 0
    assert again.notes == whole.notes
    for path in whole.out.iterdir():
        assert (again.out / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_rotation_is_another_run(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")

    def stop(done: int, *_: object) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", watch=stop)
    with pytest.raises(QplugError, match="another recipe"):
        quantize(source, tmp_path / "out", algorithm_options={"quarot": {"seed": 1}})


# --- as the model runs ---------------------------------------------------------------------------


def test_rotated_inputs_need_rotated_weights(family: Family, tmp_path: Path) -> None:
    prepared = rotated(family("llama"), online=True)
    assert prepared.online == tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(3))
    model = reference(save(prepared, tmp_path / "out"))
    wanted = logits(reference(family("llama")))
    assert distance(logits(model), wanted) > 0.1
    rotate_inputs(dict(model.named_modules()), prepared.online)
    assert distance(logits(model), wanted) <= RTOL


@pytest.mark.parametrize("algo", ["quarot+rtn", "quarot+gptq"])
def test_the_fake_folder_says_what_to_rotate(algo: str, tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    options = {"quarot": {"online": True}}
    out = quantize(source, tmp_path / "out", algo, backend="fake", algorithm_options=options).out
    wanted = logits(reference(source))
    assert distance(logits(qplug.load(str(out))), wanted) < 0.05
    manifest = json.loads((out / "qplug.json").read_text())
    assert manifest["online"] == [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    manifest["online"] = []
    (out / "qplug.json").write_text(json.dumps(manifest))
    assert distance(logits(qplug.load(str(out))), wanted) > 0.05
