"""All that moves scale leaves the float model with what it computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qplug
from qplug.calibration.samples import Samples

Family = Callable[..., Path]
MakeTokens = Callable[..., Tensor]

OPTIONS = {
    "awq": {"ratios": 4, "clip": False},
    "osplus": {"steps": 4, "norms_only": False},
    "smoothquant": {"norms_only": False},
}

pytestmark = pytest.mark.usefixtures("passes_in_float32")


@pytest.mark.parametrize("algo", ["osplus", "smoothquant", "awq"])
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "opt", "gpt-neox"),
        *("qwen3-moe", "qwen2-moe", "mixtral", "deepseek-v3"),
    ],
)
def test_every_transform_of_every_family(
    name: str,
    algo: str,
    family: Family,
    make_tokens: MakeTokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a folder that anybody loads: to 1e-5, in float32."""
    tokens = make_tokens(4, 16)
    monkeypatch.setattr(
        "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
    )
    result = qplug.quantize(
        str(family(name)),
        tmp_path / "out",
        algo=algo,
        scheme="W8A8",
        backend="hf",
        device="cpu",
        algorithm_options={algo: OPTIONS[algo]},
    )
    new = make_tokens(2, 20, seed=1)
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(new).logits
            for folder in (family(name), result.out)
        )
    assert not torch.equal(before, after)
    assert (after - before).norm() <= 1e-5 * before.norm()
