"""Schemes: those with a name that engines know, and those to be measured alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import qplug
from qplug import PRESETS, QplugError, QuantArgs, Scheme, preset
from qplug.api.scheme import ALIASES


@pytest.mark.parametrize("name", [*PRESETS, "W3A16", "W2A16_ASYM", "W4A4", "W6A6", "W8A8_ASYM"])
def test_a_scheme_survives_json(name: str) -> None:
    scheme = preset(name if name.lower() in ALIASES else name.lower())
    assert scheme.name == name
    assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_integers_of_any_width_have_a_scheme() -> None:
    assert preset("W3A16").weights == QuantArgs("int3", "group", 128)
    assert preset("W2A16_ASYM").weights == QuantArgs("int2", "group", 128, symmetric=False)
    assert preset("W6A4") == Scheme(
        "W6A4", QuantArgs("int6", "channel"), QuantArgs("int4", "token", dynamic=True)
    )
    # What has a name keeps its meaning.
    assert preset("W8A8") is PRESETS["W8A8"]


@pytest.mark.parametrize("name", ["W1A16", "W9A16", "W4A9", "W4", "W4A16ASYM", "XW4A4", "W4A4X"])
def test_what_is_no_scheme_is_refused(name: str) -> None:
    with pytest.raises(QplugError, match="no scheme"):
        preset(name)


def test_what_no_engine_serves_is_refused_by_them_and_measured_by_fake(tmp_path: Path) -> None:
    for backend in ("vllm", "sglang", "compressed-tensors"):
        with pytest.raises(QplugError, match="no layout for W6A6"):
            qplug.quantize("qplug:demo", tmp_path / backend, scheme="W6A6", backend=backend)
    perplexities = {}
    for scheme in ("W8A16", "W3A16", "W2A16", "W6A6", "W4A4"):
        out = tmp_path / scheme
        qplug.quantize("qplug:demo", out, scheme=scheme, backend="fake")
        perplexities[scheme] = qplug.evaluate(str(out), windows=4, seq_len=128).perplexity
    assert perplexities["W8A16"] < perplexities["W3A16"] < perplexities["W2A16"]
    # Inputs count: in floats the weights of W6A6 alone would cost next to nothing.
    assert perplexities["W8A16"] * 1.05 < perplexities["W6A6"] < perplexities["W4A4"]
