"""The sizes of a plan are the bytes that a run writes, and what it refuses a run refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from zoo.make import make

import qplug
from qplug import PRESETS, QplugError
from qplug.planning.fleet import find_fleet
from qplug.planning.headers import open_headers
from qplug.planning.offers import Offer, find_offers
from qplug.planning.outline import find_outline
from qplug.registry.registry import Registry

#: Models of the zoo with something of their own: experts in one tensor, layers without attention,
#: towers, draft layers, names of their own, merged linears, a head that is tied.
PECULIAR = (
    *("gpt_oss", "llama4", "qwen3_next", "jamba", "nemotron_h", "deepseek_v32", "falcon7b"),
    *("qwen3_vl_moe", "granitemoehybrid", "phi3", "gpt2", "lfm2", "afmoe", "janus"),
)


def planned(model: Path | str, backend: str) -> dict[str, Offer]:
    """What the plan offers, by scheme."""
    registry = Registry.installed().only("exporter", "reader")
    outline = find_outline(open_headers(str(model), registry.sources))
    return {o.scheme: o for o in find_offers(outline, find_fleet("H100"), registry, backend)[0]}


def run_bytes(model: Path | str, out: Path, scheme: str, backend: str) -> int | None:
    """The bytes that a run would write; None if it refuses to."""
    words: dict[str, Any] = {"scheme": scheme, "backend": backend, "samples": 2, "seq_len": 8}
    try:
        result = qplug.quantize(
            str(model), out, dry_run=True, backend_options={"gpu": "H100"}, **words
        )
    except QplugError:
        return None
    return result.bytes


@pytest.mark.parametrize(
    ("scheme", "backend"),
    [("W4A16", "vllm"), ("W8A16", "gptq"), ("W8A8_STATIC", "sglang")],
)
def test_of_the_demo_model(scheme: str, backend: str, tmp_path: Path) -> None:
    offers = planned("qplug:demo", backend)
    nbytes = offers[scheme].nbytes if scheme in offers else None
    assert nbytes == run_bytes("qplug:demo", tmp_path / "out", scheme, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["awq", "gptq", "sglang", "vllm"])
def test_of_every_scheme(backend: str, tmp_path: Path) -> None:
    for model in ("qplug:demo", make("qwen3_moe", tmp_path / "experts")):
        offers = planned(model, backend)
        for scheme in PRESETS:
            nbytes = offers[scheme].nbytes if scheme in offers else None
            wanted = run_bytes(model, tmp_path / "out", scheme, backend)
            assert nbytes == wanted, (model, scheme)


def test_of_a_run_that_writes(tmp_path: Path) -> None:
    result = qplug.quantize("qplug:demo", tmp_path / "out", scheme="FP8_DYNAMIC", backend="vllm")
    assert planned("qplug:demo", "vllm")["FP8_DYNAMIC"].nbytes == result.bytes
    header = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < header - result.bytes < 100_000  # headers


@pytest.mark.slow
@pytest.mark.parametrize("name", PECULIAR)
def test_of_peculiar_models(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "model")
    for scheme, backend in (("W4A16", "vllm"), ("FP8_DYNAMIC", "sglang")):
        offers = planned(model, backend)
        wanted = run_bytes(model, tmp_path / "out", scheme, backend)
        if wanted is not None:
            assert offers[scheme].nbytes == wanted, (scheme, backend)
    shutil.rmtree(model)
