"""Scales of keys and values: found without naming an architecture, and those that are stored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import qplug
from qplug import Exporter, Format, ModelView, QplugError
from qplug.api.scheme import CACHES
from qplug.calibration.samples import Samples
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.kv_cache import ObservedCache, find_cache
from qplug.model.view import model_view
from qplug.reading.folder import open_folder
from qplug.registry.registry import Registry

Family = Callable[..., Path]
MakeTokens = Callable[..., Tensor]

FP8 = CACHES["fp8"]
#: Searches that take no longer than a test needs.
SHORT: dict[str, dict[str, Any]] = {
    "awq": {"ratios": 3, "clip_steps": 2, "clip_in_search": 0},
    "osplus": {"steps": 3},
}
#: The module that fills the cache, and the name by which blocks know the cache.
SITES = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "phi"),
        ("model.layers.{}.self_attn", "past_key_values"),
    ),
    "opt": ("model.decoder.layers.{}.self_attn", "past_key_values"),
    "gpt-neox": ("gpt_neox.layers.{}.attention", "layer_past"),
}


@pytest.mark.parametrize("name", SITES)
def test_who_fills_the_cache_is_found(name: str, family: Family) -> None:
    source = open_checkpoint(family(name))
    view = model_view(source)
    found = find_cache(source, view, FP8)
    module, argument = SITES[name]
    assert found.argument == argument
    for number, block in enumerate(view.blocks):
        wanted = tuple(f"{module.format(number)}.{local}" for local in ("k_scale", "v_scale"))
        assert tuple(found.scale_specs(block)) == wanted


def test_rotary_tables_may_depend_on_positions(tmp_path: Path) -> None:
    """Such an architecture asks for values outside its blocks, where there must be some."""
    config = transformers.Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32,
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    assert len(find_cache(source, model_view(source), FP8).modules) == 2


def test_blocks_without_attention_are_refused(tmp_path: Path) -> None:
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    with pytest.raises(QplugError) as caught:
        qplug.quantize(
            str(tmp_path / "mamba"),
            tmp_path / "out",
            scheme="W8A8",
            backend="compressed-tensors",
            kv_cache="fp8",
        )
    assert str(caught.value) == (
        "backbone.layers.0: nothing in it fills a KV cache, so none can be quantized"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mamba"]


def test_keys_that_are_not_finite_are_refused() -> None:
    observed = ObservedCache()
    keys = torch.ones(1, 1, 2, 4)
    observed.update(keys, keys * torch.nan)
    with pytest.raises(QplugError, match="here: its keys or values are not finite"):
        observed.scales(FP8, "here")


@pytest.fixture
def tokens_given(make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Runs calibrate on these tokens, not on those of a dataset."""
    tokens = make_tokens(4, 20)
    monkeypatch.setattr(
        "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
    )
    return tokens


@pytest.mark.parametrize(
    ("name", "algo", "scheme"),
    [
        ("llama", "awq", "W4A16"),  # moves scale from values to what reads them
        ("qwen2", "rtn", "W8A8"),
        ("qwen3", "rtn", "FP8"),
        ("mistral", "rtn", "W4A16"),
        ("gemma2", "smoothquant", "W8A8_STATIC"),
        ("gemma3", "rtn", "W4A16"),
        ("phi3", "gptq", "W4A16"),
        ("opt", "osplus", "W8A8"),
        ("gpt-neox", "rtn", "W8A8"),
    ],
)
@torch.no_grad()
def test_scales_just_cover_what_the_quantized_model_stores(
    name: str, algo: str, scheme: str, family: Family, tokens_given: Tensor, tmp_path: Path
) -> None:
    out = qplug.quantize(
        str(family(name)),
        tmp_path / "out",
        algo=algo,
        scheme=scheme,
        group_size=16 if scheme == "W4A16" else None,
        backend="compressed-tensors",
        kv_cache="fp8",
        algorithm_options={algo: SHORT[algo]} if algo in SHORT else {},
        device="cpu",
    ).out
    assert qplug.verify(str(out)).problems == ()
    model: Any = qplug.load(str(out))
    cache = DynamicCache()  # without a configuration no layer forgets what leaves its window
    model(tokens_given, past_key_values=cache, use_cache=True)
    scales = open_folder(str(out), Session.alone()).cache_scales()
    assert len(scales) == len(cache.layers) == 3
    for number, layer in enumerate(cache.layers):
        for stored, scale in zip((layer.keys, layer.values), scales[number], strict=True):
            assert scale.shape == (1,)
            codes = stored.double() / scale.double()
            assert codes.abs().max().item() == pytest.approx(448, rel=1e-5)
            grid = codes.float().to(torch.float8_e4m3fn).double()
            assert torch.allclose(codes, grid, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@torch.no_grad()
def test_each_head_has_a_scale_that_just_covers_it(
    name: str, family: Family, tokens_given: Tensor, tmp_path: Path
) -> None:
    """Of the quantized model, on the data of the calibration; of queries too."""
    out = qplug.quantize(
        str(family(name)),
        tmp_path / "out",
        algo="rtn",
        scheme="W8A16",
        group_size=16,
        backend="compressed-tensors",
        kv_cache="fp8_per_head",
        device="cpu",
    ).out
    assert qplug.verify(str(out)).problems == ()
    model: Any = qplug.load(str(out))
    queries, attend = [], torch.nn.functional.scaled_dot_product_attention

    def seeing(query: Tensor, *args: Any, **call: Any) -> Tensor:
        queries.append(query)
        return attend(query, *args, **call)

    cache = DynamicCache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", seeing)
        model(tokens_given, past_key_values=cache, use_cache=True)
    folder = open_folder(str(out), Session.alone())
    for number, layer in enumerate(cache.layers):
        (attention,) = {
            stored.rpartition(".")[0]
            for stored in folder.checkpoint.tensors
            if stored.startswith(folder.view.blocks[number]) and stored.endswith(".q_scale")
        }
        for part, local in ((layer.keys, "k"), (layer.values, "v"), (queries[number], "q")):
            scale = folder.checkpoint.read(f"{attention}.{local}_scale")
            assert scale.shape == (part.shape[1], 1, 1)
            covered = (part.abs() / scale).amax((0, 2, 3))
            # Queries come rounded: to 1 in 16, under the largest scale of heads with the same keys.
            exact = torch.full_like(covered, 448)
            assert torch.allclose(covered, exact, rtol=1 / 16 if local == "q" else 1e-5)
            largest = scale.view(layer.keys.shape[1], -1).argmax(1, keepdim=True)
            groups = covered.view(layer.keys.shape[1], -1)
            assert torch.allclose(groups.gather(1, largest), torch.tensor(448.0), rtol=1e-5)


def test_queries_that_are_not_seen_are_refused(
    family: Family, tokens_given: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObservedCache, "with_queries", lambda self: nullcontext())
    with pytest.raises(QplugError, match="cannot see the queries of its attention"):
        qplug.quantize(
            str(family("llama")),
            tmp_path / "out",
            scheme="W8A16",
            group_size=16,
            backend="compressed-tensors",
            kv_cache="fp8_per_head",
            device="cpu",
        )


@torch.no_grad()
def test_the_rounding_is_the_textbook_s(
    family: Family, tokens_given: Tensor, tmp_path: Path
) -> None:
    """Of a model whose weights are kept, by a plain cache that rounds; ``use_cache`` or not."""
    source = family("llama")
    out = qplug.quantize(
        str(source),
        tmp_path / "out",
        backend="fake",
        scheme="W8A16",
        group_size=16,
        kv_cache="fp8",
        device="cpu",
    ).out
    scales = open_folder(str(out), Session.alone()).cache_scales()

    class Rounding(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> Any:
            k, v = scales[layer]
            rounded = (
                (part / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
                for part, s in ((keys, k), (values, v))
            )
            return super().update(*rounded, layer, *args)

    model: Any = qplug.load(str(out))
    plain: Any = qplug.load(str(out), quantize_activations=False)
    wanted = plain(tokens_given, past_key_values=Rounding(), use_cache=True).logits
    for options in ({"use_cache": False}, {"use_cache": True}, {}):
        assert torch.equal(model(tokens_given, **options).logits, wanted)
    assert not torch.allclose(plain(tokens_given).logits, wanted, rtol=1e-3)
    # A cache that is used again rounds what is new, and only that.
    first = model(tokens_given[:, :8], use_cache=True)
    rest = model(tokens_given[:, 8:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(rest.logits, wanted[:, 8:], rtol=1e-4, atol=1e-4)
    one = model.generate(tokens_given[:1, :8], max_new_tokens=3, do_sample=False)
    assert one.shape == (1, 11)


def test_an_exporter_that_says_nothing_stores_none() -> None:
    registry = Registry.installed()
    storing = {"compressed-tensors", "vllm", "sglang", "fake"}
    model = ModelView({}, "bfloat16", {}, frozenset(), (), None)
    for name in registry.exporters:
        exporter: Exporter[Any] = registry.exporters[name](registry.exporters[name].Params())
        assert (exporter.refuses_cache(FP8, model) is None) == (name in storing), name
    assert "no place" in str(Format.refuses_cache(None, FP8))  # type: ignore[arg-type]


def test_config_and_manifest_say_so(tmp_path: Path) -> None:
    out = qplug.quantize(
        "qplug:demo", tmp_path / "out", backend="vllm", kv_cache="fp8", samples=2, seq_len=16
    ).out
    opened = open_folder(str(out), Session.alone())
    told = opened.checkpoint.config["quantization_config"]["kv_cache_scheme"]
    kept = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    assert [told[key] for key in kept] == [8, "float", "tensor", True, False]
    assert opened.kv_cache == FP8
    assert opened.manifest is not None
    assert opened.manifest.kv_cache == FP8
    with pytest.raises(QplugError, match="--kv-cache int4: must be one of fp8"):
        qplug.quantize("qplug:demo", tmp_path / "other", backend="vllm", kv_cache="int4")
