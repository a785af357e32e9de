"""qplug never calls its own output unsound, and sees floats that are."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from spoilt import forget_checksums

import qplug
from qplug import QplugError

WriteLlama = Callable[..., Path]

SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16")
pytestmark = pytest.mark.hypothesis


@given(
    dtype=st.sampled_from(("float32", "bfloat16", "float16")),
    stored=st.sampled_from(("as stated", "float32", "bfloat16", "float8_e4m3fn")),
    scheme=st.sampled_from((*SCHEMES, "MXFP4A16")),
    backend=st.sampled_from(("compressed-tensors", "fake")),
    hidden=st.sampled_from((32, 64, 96)),
    inner=st.sampled_from((32, 128, 160)),
    size=st.sampled_from((1, 8, 32, -1)),
    exponent=st.sampled_from((-12, -3, 0, 2)),
    dead=st.booleans(),
)
@settings(max_examples=12)
def test_what_a_run_writes_is_sound(
    write_llama: WriteLlama,
    dtype: str,
    stored: str,
    scheme: str,
    backend: str,
    hidden: int,
    inner: int,
    size: int,
    exponent: int,
    dead: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = write_llama(
            Path(folder) / "model",
            dtype=dtype,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=1,
            head_dim=32,
        )
        (model / "tokenizer.json").write_text("{}")
        shard = model / "model.safetensors"
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if "_proj" in name:
                tensor *= 10.0**exponent
                tensor[0] *= not dead
                if stored != "as stated":
                    tensors[name] = tensor.to(getattr(torch, stored))
        save_file(tensors, shard, {"format": "pt"})
        words: dict[str, Any] = {"scheme": scheme, "backend": backend}
        if scheme in ("W4A16", "W4A16_ASYM", "W8A16"):
            words["group_size"] = size
        try:
            qplug.quantize(str(model), Path(folder) / "out", **words)
        except QplugError:
            return  # not written, so not unsound
        verified = qplug.verify(str(Path(folder) / "out"))
        assert verified.against is not None
        assert verified.ok, verified.problems


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_float_that_is_not_finite_is_named(llama: Path, tmp_path: Path, value: float) -> None:
    (llama / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    qplug.quantize(str(llama), out, group_size=32, backend="compressed-tensors")
    shutil.rmtree(llama)
    shard = out / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, shard, {"format": "pt"})
    (problem,) = qplug.verify(str(forget_checksums(out))).problems
    assert (problem.check, problem.where) == ("values", "model.norm.weight")
