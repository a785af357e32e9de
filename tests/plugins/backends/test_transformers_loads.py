"""transformers, with compressed-tensors, computes from a folder just what ``qplug.load`` does."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

import qplug
from qplug.model.rounding_hooks import round_inputs_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from qplug import QuantArgs

    Quantized = Callable[..., Path]

WEIGHT_ONLY = ("W4A16", "W8A16")
WITH_ACTIVATIONS = ("W8A8", "W8A8_STATIC", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")
EVERY = (*WEIGHT_ONLY, "W4A16_ASYM", *WITH_ACTIVATIONS)


def logits(model: Any) -> Tensor:
    tokens = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model.eval()(tokens).logits
    return found


def theirs(folder: Path, dtype: str, **options: Any) -> Tensor:
    return logits(
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    )


def ours(folder: Path, dtype: str, **options: Any) -> Tensor:
    return logits(qplug.load(str(folder), dtype=dtype, **options))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_weight_only_is_equal_bit_for_bit(quantized: Quantized, scheme: str, dtype: str) -> None:
    out = quantized(scheme)
    assert torch.equal(theirs(out, dtype), ours(out, dtype))


@pytest.mark.parametrize("group_size", [32, -1])
def test_other_groups_are_equal_bit_for_bit(quantized: Quantized, group_size: int) -> None:
    out = quantized("W4A16", group_size=group_size)
    assert torch.equal(theirs(out, "bfloat16"), ours(out, "bfloat16"))


# This is the only way to load W4A16_ASYM: the other one fails in compressed-tensors 0.18 to 0.20
# (it lays out `weight_zero_point` unpacked, and then meets the packed one). Weights come in the
# dtype of their scales, so weight-only schemes are compared in the checkpoint's dtype alone.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [*((name, "bfloat16") for name in EVERY), *((name, "float32") for name in WITH_ACTIVATIONS)],
)
def test_dequantized_is_equal_bit_for_bit(quantized: Quantized, scheme: str, dtype: str) -> None:
    out = quantized(scheme, backend="vllm")
    drop_activations = CompressedTensorsConfig(dequantize=True)
    found = theirs(out, dtype, quantization_config=drop_activations)
    assert torch.equal(found, ours(out, dtype, quantize_activations=False))


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_activations_are_equal_bit_for_bit(quantized: Quantized, scheme: str) -> None:
    # In float32: compressed-tensors divides activations in the model's dtype, engines and qplug
    # in float32.
    out = quantized(scheme, backend="vllm")
    assert torch.equal(theirs(out, "float32"), ours(out, "float32"))


def test_int8_activations_differ_by_their_divisor_alone(
    quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantized("W8A8")
    reference = theirs(out, "float32")
    unrounded = ours(out, "float32", quantize_activations=False)
    as_engines_do = ours(out, "float32")

    # Engines divide by max|x| / 127, compressed-tensors by max|x| / 127.5. Neither grid is finer,
    # so the two results are as far from each other as two independent roundings are: sqrt(2) times
    # as far as from what is not rounded at all, with a tenth for chance.
    rounding = (as_engines_do - unrounded).norm().item()
    assert (reference - unrounded).norm().item() == pytest.approx(rounding, rel=0.1)
    assert (as_engines_do - reference).norm().item() < 1.1 * 2**0.5 * rounding

    # With their divisor in qplug's own code path, nothing is left to differ.
    def with_their_divisor(x: Tensor, args: QuantArgs, given: Tensor | None) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        return (x / scale).round().clamp(-128, 127) * scale

    rounding_so = partial(round_inputs_of, function=with_their_divisor)
    monkeypatch.setattr("qplug.reading.load.round_inputs_of", rounding_so)
    assert torch.equal(reference, ours(out, "float32"))


def test_a_cache_in_fp8_loads(quantized: Quantized) -> None:
    """Nothing is missing or left over; transformers itself keeps keys and values as they are."""
    out = quantized("W8A8_STATIC", backend="vllm", kv_cache="fp8")
    model, loading = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for block in range(4):
        for name in ("k_scale", "v_scale"):
            tensor = f"model.layers.{block}.self_attn.{name}"
            stored = load_file(out / "model.safetensors")[tensor]
            assert held[tensor].item() == stored.item()


def test_two_formats_in_one_folder_are_read_alike(quantized: Quantized) -> None:
    out = quantized(
        "W4A16", backend="vllm", overrides={"*.mlp.*": "W8A16", "*.0.self_attn.*": "W8A16"}
    )
    assert torch.equal(theirs(out, "bfloat16"), ours(out, "bfloat16"))


def test_ignored_layers_stay_float(quantized: Quantized) -> None:
    out = quantized("W4A16", ignore=("*.down_proj", "model.layers.0.*"))
    assert torch.equal(theirs(out, "bfloat16"), ours(out, "bfloat16"))
