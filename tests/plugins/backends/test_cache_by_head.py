"""A KV cache with a scale for each head, as llm-compressor stores it: read, verified, rounded."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from safetensors.torch import load_file, save_file
from spoilt import forget_checksums

import qplug
from qplug import QplugError, QuantArgs, Scheme
from qplug.machine.session import Session
from qplug.model.kv_cache import RoundedCache
from qplug.reading.folder import open_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Quantized = Callable[..., Path]

BY_HEAD = QuantArgs("e4m3", "attn_head")
ATTENTION = "model.layers.1.self_attn"


@pytest.fixture
def by_head(quantized: Quantized, tmp_path: Path) -> Path:
    """A folder in W8A8 whose scales grow from head to head, ``[heads, 1, 1]``, of queries too."""
    out = quantized("W8A8", backend="vllm", kv_cache="fp8", samples=2, seq_len=32)
    folder = forget_checksums(copytree(out, tmp_path / "by-head"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "attn_head"
    (folder / "config.json").write_text(json.dumps(config))
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    assert heads["q"] > heads["k"] > 1
    tensors = load_file(folder / "model.safetensors")
    for name, scale in [*tensors.items()]:
        if name.endswith(("k_scale", "v_scale")):
            growing = 1 + torch.arange(heads["k"]).float()
            tensors[name] = (scale * growing).reshape(-1, 1, 1)
        if name.endswith("k_scale"):
            tensors[name.replace("k_scale", "q_scale")] = torch.ones(heads["q"], 1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_it_is_read_and_verified(by_head: Path) -> None:
    for backend in (None, "vllm", "compressed-tensors"):
        assert qplug.verify(str(by_head), backend=backend).problems == ()
    folder = open_folder(str(by_head), Session.alone())
    assert folder.kv_cache == BY_HEAD
    heads = folder.view.config["num_key_value_heads"]
    assert {scale.shape for pair in folder.cache_scales().values() for scale in pair} == {(heads,)}
    weights = dict(folder.weights())
    assert not [name for name in weights if name.endswith("_scale")]


def test_engines_that_drop_them_say_so(by_head: Path) -> None:
    said = {str(each) for each in qplug.verify(str(by_head), backend="sglang").problems}
    assert said == {
        "cache: config.json: SGLang 0.5.23 ignores this kv_cache_scheme and drops its scales"
    }
    old = qplug.verify(str(by_head), backend="vllm", engine_version="0.26").problems
    assert [each.check for each in old] == ["cache"]


@pytest.mark.parametrize(
    ("local", "value", "said"),
    [
        ("k_scale", torch.ones(3), "shape: {}: is float32 [3], not float32 [2]"),
        ("q_scale", torch.ones(2, 1, 1), "shape: {}: is float32 [2, 1, 1], not float32 [4]"),
        (
            "v_scale",
            torch.tensor([1.0, 0.0]),
            "scale: {}: a scale is zero, negative, or not finite",
        ),
        ("q_scale", None, None),
    ],
)
def test_wrong_scales_are_reported(
    by_head: Path, local: str, value: Tensor | None, said: str | None
) -> None:
    tensors = load_file(by_head / "model.safetensors")
    name = f"{ATTENTION}.{local}"
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    save_file(tensors, by_head / "model.safetensors", {"format": "pt"})
    found = [str(each) for each in qplug.verify(str(by_head), backend="vllm").problems]
    assert found == ([] if said is None else [said.format(name)])  # queries then have scales of 1


def test_a_head_is_rounded_under_its_own_scale() -> None:
    """As compressed-tensors rounds."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 2, 5, 16) * torch.tensor([1.0, 40.0])[:, None, None]
    scales = (torch.tensor([0.01, 0.3]), torch.tensor([0.5, 0.02]))
    args = QuantizationArgs(num_bits=8, type="float", strategy="attn_head", dynamic=False)
    rounded = RoundedCache(BY_HEAD, scales).update(keys, values)
    for ours, exact, scale in zip(rounded, (keys, values), scales, strict=True):
        assert torch.equal(ours, fake_quantize(exact, scale.view(-1, 1, 1), None, args))


def test_the_model_is_measured_with_them(by_head: Path, quantized: Quantized) -> None:
    one: dict[str, Any] = {"samples": 2, "seq_len": 32}
    whole = quantized("W8A8", backend="vllm", kv_cache="fp8", **one)
    tokens = torch.arange(3, 67).unsqueeze(0)
    with torch.no_grad():
        logits = [qplug.load(str(each))(tokens).logits for each in (by_head, whole)]
    assert not torch.equal(*logits)
    assert torch.nn.functional.cosine_similarity(*[each.flatten() for each in logits], dim=0) > 0.99


# --- queries --------------------------------------------------------------------------------------


def to_fp8(part: Tensor, scale: Tensor) -> Tensor:
    return (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def with_query_scales(folder: Path, scales: Callable[[int], Tensor]) -> None:
    """Stores ``scales(number)`` for the queries of each block."""
    tensors = load_file(folder / "model.safetensors")
    for number in range(4):
        tensors[f"model.layers.{number}.self_attn.q_scale"] = scales(number)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["attn_head", "tensor"])
def test_the_rounding_of_queries_is_the_textbook_s(
    by_head: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all layers, before they are multiplied with keys, by one scale for heads with same keys.

    vLLM has 2 scales for the 4 heads of queries here: the largest of 2 and 2.
    """
    stored = {
        "attn_head": torch.tensor([0.002, 0.05, 0.3, 0.01]).view(4, 1, 1),
        "tensor": torch.tensor([0.02]),
    }[strategy]
    kept = {"attn_head": [0.05, 0.05, 0.3, 0.3], "tensor": [0.02]}[strategy]
    if strategy == "tensor":
        config = json.loads((by_head / "config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"]["strategy"] = strategy
        (by_head / "config.json").write_text(json.dumps(config))
        tensors = load_file(by_head / "model.safetensors")
        for name in tensors:
            if name.endswith(("k_scale", "v_scale")):
                tensors[name] = tensors[name].flatten()[:1].clone()
        save_file(tensors, by_head / "model.safetensors", {"format": "pt"})
    with_query_scales(by_head, lambda number: stored * (1 + number))
    assert qplug.verify(str(by_head), backend="vllm").problems == ()

    tokens = torch.arange(3, 67).unsqueeze(0)
    found = qplug.load(str(by_head))(tokens).logits
    tensors = load_file(by_head / "model.safetensors")
    plain = {name: t for name, t in tensors.items() if not name.endswith("q_scale")}
    save_file(plain, by_head / "model.safetensors", {"format": "pt"})
    model: Any = qplug.load(str(by_head))  # rounds keys and values, not queries
    without = model(tokens).logits
    attend, layers = torch.nn.functional.scaled_dot_product_attention, iter(range(4))

    def rounding(query: Tensor, *args: Any, **call: Any) -> Tensor:
        scale = torch.tensor(kept).view(-1, 1, 1) * (1 + next(layers))
        return attend(to_fp8(query, scale), *args, **call)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounding)
    wanted = model(tokens).logits
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, without, rtol=1e-3)


@torch.no_grad()
def test_each_token_sees_rounded_queries_as_it_is_generated(by_head: Path) -> None:
    with_query_scales(by_head, lambda number: torch.full((4, 1, 1), 0.05))
    model: Any = qplug.load(str(by_head))
    tokens = torch.arange(3, 35).unsqueeze(0)
    whole = model(tokens).logits
    first = model(tokens[:, :20], use_cache=True)
    rest = model(tokens[:, 20:], past_key_values=first.past_key_values, use_cache=True).logits
    assert torch.allclose(rest, whole[:, 20:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_attention_that_is_computed_otherwise_is_refused(by_head: Path) -> None:
    model: Any = qplug.load(str(by_head))
    model.set_attn_implementation("eager")
    with pytest.raises(QplugError, match="self_attn: does not compute attention by scaled_dot_pro"):
        model(torch.arange(3, 9).unsqueeze(0))


def test_scales_of_queries_that_do_not_fit_are_refused(by_head: Path) -> None:
    with_query_scales(by_head, lambda number: torch.ones(3, 1, 1))
    with pytest.raises(QplugError, match="q_scale: 3 scales do not fit 2 keys"):
        qplug.load(str(by_head))


@torch.no_grad()
def test_a_folder_is_compared_with_rounded_queries(by_head: Path) -> None:
    """Coarse queries make each block, computed alone, worse than exact ones."""
    with_query_scales(by_head, lambda number: torch.full((4, 1, 1), 1000.0))  # all become zero
    coarse = qplug.compare(str(by_head), "qplug:demo", windows=2, seq_len=32)
    with_query_scales(by_head, lambda number: torch.full((4, 1, 1), 0.05))
    fine = qplug.compare(str(by_head), "qplug:demo", windows=2, seq_len=32)
    for name, block in coarse.blocks.items():
        assert block.alone > 1.5 * fine.blocks[name].alone


@pytest.mark.parametrize(
    ("backend", "options", "said"),
    [
        ("vllm", {"gpu": "sm89"}, "need FlashAttention 3, which is for sm90, not sm89: use fp8"),
        ("vllm", {"engine": "0.26"}, "vLLM 0.26.0 drops the scales of a KV cache"),
        ("sglang", {}, "SGLang 0.5.23 drops the scales of a KV cache"),
        ("gptq", {}, "has no place for the scales of a KV cache"),
    ],
)
def test_where_it_is_not_served(
    backend: str, options: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(QplugError, match=said):
        qplug.quantize(
            "qplug:demo",
            tmp_path / "out",
            scheme="W8A16",
            backend=backend,
            backend_options=options,
            kv_cache="fp8_per_head",
            dry_run=True,
        )


def test_it_is_written_for_vllm(quantized: Quantized) -> None:
    out = quantized(
        "W8A8",
        backend="vllm",
        backend_options={"gpu": "sm90"},
        kv_cache="fp8_per_head",
        samples=2,
        seq_len=32,
    )
    assert qplug.verify(str(out)).ok
    folder = open_folder(str(out), Session.alone())
    assert folder.kv_cache == BY_HEAD
    told = folder.checkpoint.config["quantization_config"]["kv_cache_scheme"]
    assert QuantizationArgs.model_validate(told).strategy == "attn_head"
    specs = {n: folder.checkpoint.tensors[f"{ATTENTION}.{n}_scale"].spec.shape for n in "qkv"}
    assert specs == {"q": (4, 1, 1), "k": (2, 1, 1), "v": (2, 1, 1)}


def test_no_layer_has_scales_of_heads() -> None:
    for args in ((BY_HEAD, None), (QuantArgs("int8", "channel"), BY_HEAD)):
        with pytest.raises(QplugError, match="'attn_head' is of a KV cache"):
            Scheme("x", *args)
