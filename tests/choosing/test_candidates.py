"""The schemes to choose from are those that the backend serves, on its device, in one folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import Family

from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.choosing.candidates import candidates, families, served_schemes
from qplug.choosing.decisions import decisions
from qplug.model.view import model_view
from qplug.recipe.spelled_scheme import scheme_text
from qplug.registry.registry import Registry

INT4 = {f"W4A16{zero} {size}" for zero in ("", "_ASYM") for size in ("g32", "g64", "g128", "row")}
INT8 = {f"W8A16 {size}" for size in ("g32", "g64", "g128", "row")}
FP8 = {"FP8_DYNAMIC", "FP8_BLOCK"}


@pytest.mark.parametrize(
    ("backend", "gpu", "served"),
    [
        ("vllm", "cpu", INT4 | {"W8A8", "FP8_DYNAMIC"}),
        ("vllm", "sm100", INT4 | INT8 | FP8 | {"NVFP4A16", "MXFP4A16"}),
        ("vllm", "sm90", INT4 | INT8 | FP8 | {"W8A8", "W4AFP8", "NVFP4A16", "MXFP4A16"}),
        ("vllm", "any", INT4 | INT8 | FP8 | {"NVFP4A16", "MXFP4A16"}),
        ("sglang", "any", INT4 | INT8 | {"FP8_DYNAMIC", "NVFP4A16"}),
        ("gptq", "H100", {name for name in INT4 if "ASYM" not in name} | INT8),
    ],
)
def test_what_the_tables_serve(backend: str, gpu: str, served: set[str]) -> None:
    exporter = Registry.installed().exporters.make(backend, {"gpu": gpu})
    assert set(map(scheme_text, served_schemes(exporter))) == served


def ways_of(folder: Path, backend: str, gpu: str, **options: str) -> list[set[str]]:
    """The names of schemes that may be mixed, one set for each way."""
    view = model_view(open_checkpoint(folder))
    exporter = Registry.installed().exporters.make(backend, {"gpu": gpu, **options})
    found = decisions([name for name in view.linears if name in view.quantizable], exporter)
    ways = families(candidates(found, served_schemes(exporter), view, exporter, {}), view, exporter)
    return [{s.name for each in way.values() for s in each if s is not None} for way in ways]


def test_vllm_takes_all_in_one_folder() -> None:
    (way,) = ways_of(find_model("qplug:demo"), "vllm", "sm90")
    assert {"W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "MXFP4A16"} <= way


def test_sglang_takes_all_in_one_folder() -> None:
    (way,) = ways_of(find_model("qplug:demo"), "sglang", "sm90")
    assert {"W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16"} <= way


def test_an_old_sglang_takes_one_format_in_a_folder() -> None:
    ways = ways_of(find_model("qplug:demo"), "sglang", "sm90", engine="0.5.16")
    assert {"W4A16", "W4A16_ASYM", "W8A16"} in ways
    assert {"W8A8"} in ways
    assert {"FP8_DYNAMIC", "FP8_BLOCK"} in ways
    assert {"NVFP4A16"} in ways
    assert len(ways) == 4


def test_static_inputs_are_candidates_where_nothing_as_fine_is_served() -> None:
    make = Registry.installed().exporters.make
    on_b200 = served_schemes(make("sglang", {"gpu": "sm100", "engine": "0.5.16"}))
    assert {s.name for s in on_b200 if s.static_inputs} == {"NVFP4"}
    for gpu in ("sm90", "any"):  # it has NVFP4A16 there
        found = served_schemes(make("sglang", {"gpu": gpu, "engine": "0.5.16"}))
        assert not any(scheme.static_inputs for scheme in found)
    ways = ways_of(find_model("qplug:demo"), "sglang", "sm100", engine="0.5.16")
    assert {"NVFP4"} in ways


def test_awq_takes_one_scheme() -> None:
    for way in ways_of(find_model("qplug:demo"), "awq", "sm90"):
        assert way == {"W4A16_ASYM"}


def test_a_scheme_that_does_not_divide_a_layer_is_no_candidate(family: Family) -> None:
    view = model_view(open_checkpoint(family("llama")))  # its down_proj reads 80 channels
    exporter = Registry.installed().exporters.make("vllm", {"gpu": "sm90"})
    found = decisions([name for name in view.linears if name in view.quantizable], exporter)
    options = candidates(found, served_schemes(exporter), view, exporter, {})
    (down,) = (d for d in options if d.name == "model.layers.0.mlp.down_proj")
    assert "W8A8" in {s.name for s in options[down] if s is not None}
    assert "W4A16" not in {s.name for s in options[down] if s is not None}
    assert options[down][-1] is None
