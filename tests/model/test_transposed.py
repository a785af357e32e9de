"""Linears that files store as [in, out], as GPT-2's, are linears like all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import qplug
from qplug import QplugError
from qplug.checkpoint.open import open_checkpoint
from qplug.model.architectures import by_linear, find_view
from qplug.registry.registry import Registry

Family = Callable[..., Path]
MakeTokens = Callable[..., Tensor]

DATA: dict[str, Any] = {
    "samples": 4,
    "seq_len": 16,
    "device": "cpu",
    "group_size": 32,
    "dataset": "text",
}
PACKED = {"backend": "compressed-tensors", **DATA}
HIDDEN, QKV = 64, 192


@pytest.fixture
def text(tmp_path: Path) -> dict[str, str]:
    """The options of a dataset that is quickly read."""
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"The number {i} is followed by {i + 1}." for i in range(60)))
    return {"path": str(file)}


def test_the_view_has_linears(family: Family) -> None:
    checkpoint = by_linear(open_checkpoint(family("gpt2")), Registry.installed())
    view = find_view(checkpoint, Registry.installed())
    name = "transformer.h.0.attn.c_attn"
    assert view.linears[name] == (QKV, HIDDEN)
    assert name in view.quantizable
    assert checkpoint.tensors[f"{name}.weight"].spec.shape == (QKV, HIDDEN)
    stored = load_file(checkpoint.folder / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(checkpoint.read(f"{name}.weight"), stored.T)
    assert f"{name}.bias" not in checkpoint.transposed


@pytest.mark.parametrize("algo", ["rtn", "gptq"])
def test_eight_bits_compute_what_the_model_did(
    algo: str, family: Family, make_tokens: MakeTokens, text: dict[str, str], tmp_path: Path
) -> None:
    """A matrix that was read or written the wrong way round would compute noise."""
    folder, tokens = family("gpt2"), make_tokens(2, 16)
    out = tmp_path / "out"
    qplug.quantize(str(folder), out, algo=algo, scheme="W8A16", dataset_options=text, **PACKED)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        found = qplug.load(str(out))(tokens).logits
    assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("algo", ["rtn", "awq", "quarot+gptq"])
def test_rounded_floats_are_stored_as_the_model_was_published(
    algo: str, family: Family, make_tokens: MakeTokens, text: dict[str, str], tmp_path: Path
) -> None:
    """transformers' own class reads the folder that the backend of float weights writes."""
    folder, tokens = family("gpt2"), make_tokens(2, 16)
    out = tmp_path / "out"
    qplug.quantize(
        str(folder), out, algo=algo, scheme="W8A16", backend="fake", dataset_options=text, **DATA
    )
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(tokens).logits
        read = qplug.load(str(out), quantize_activations=False)(tokens).logits
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    torch.testing.assert_close(read, found)


def test_an_ignored_matrix_stays_as_it_was(
    family: Family, text: dict[str, str], tmp_path: Path
) -> None:
    folder, out = family("gpt2"), tmp_path / "out"
    qplug.quantize(
        str(folder), out, algo="gptq", ignore=["*.attn.*"], dataset_options=text, **PACKED
    )
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    name = "transformer.h.1.attn.c_attn.weight"
    assert torch.equal(after[name], before[name])
    verification = qplug.verify(out, against=str(folder))
    assert verification.ok, verification.problems


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_codes_that_engines_would_turn_are_refused(
    backend: str, family: Family, tmp_path: Path
) -> None:
    with pytest.raises(QplugError, match=r"c_attn.weight: engines transpose it as they load it"):
        qplug.quantize(str(family("gpt2")), tmp_path / "out", scheme="FP8_DYNAMIC", backend=backend)
    assert not (tmp_path / "out").exists()
