"""``--backend vllm+sglang``: one folder for two engines, within the limits and rules of both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import copytree
from typing import Any, ClassVar

import pytest
from spoilt import forget_checksums

import qplug
from qplug import Capability, Engine, Exporter, ModelView, QplugError, Registry, Target, preset
from qplug.api.joined import JoinedEngine, served_by_all
from qplug.testing import registry_with
from qplug_compressed_tensors.format import CompressedTensors

Quantized = Callable[..., Path]

REGISTRY = Registry.installed(only_shipped=True)
BOTH = "vllm+sglang"


def view(**linears: tuple[int, int]) -> ModelView:
    named = {f"layers.0.{name}": shape for name, shape in linears.items()}
    return ModelView({}, "bfloat16", named, frozenset(named), ("layers.0",), None)


def refused(schemes: Mapping[str, str], backend: str = BOTH, **options: Any) -> str | None:
    exporter = REGISTRY.exporters.make(backend, options)
    model = view(**dict.fromkeys(schemes, (128, 128)))
    return exporter.refuses(model, {f"layers.0.{n}": preset(s) for n, s in schemes.items()})


@pytest.mark.parametrize("scheme", ["W4A16", pytest.param("FP8_DYNAMIC", marks=pytest.mark.slow)])
def test_the_folder_is_the_folder_of_each(quantized: Quantized, scheme: str) -> None:
    both = quantized(scheme, backend=BOTH)
    for backend in ("vllm", "sglang"):
        own = quantized(scheme, backend=backend)
        for name in ("model.safetensors", "config.json"):
            assert (own / name).read_bytes() == (both / name).read_bytes(), backend
        assert qplug.verify(str(both), backend=backend).ok
    found = qplug.verify(str(both))
    assert (found.ok, found.backend) == (True, BOTH)


def test_what_one_engine_does_not_serve_is_refused() -> None:
    assert refused({"up": "W4A16"}) is None
    found = refused({"up": "W3A16"})
    assert found == "sglang: layers.0.up: SGLang has integers of 4 and 8 bits alone"
    found = refused({"up": "W4A16", "down": "W8A8"}, engine="0.33.0+0.5.16")
    assert found is not None
    assert found.startswith("sglang: SGLang 0.5.16 reads one format in a folder")
    found = refused({"up": "W4A16"}, gpu="cpu")
    assert found is not None
    assert found.startswith("sglang: layers.0.up: SGLang asks CUDA")


def test_what_they_store_in_different_ways_is_refused() -> None:
    for backend, scheme in ((BOTH, "NVFP4"), ("vllm+gptq", "W4A16"), ("sglang+awq", "W4A16_ASYM")):
        sentence = refused({"up": scheme}, backend)
        first, second = backend.split("+")
        stored = f"layers.0.up: {first} and {second} store {scheme} in different tensors"
        assert sentence is not None
        assert sentence.startswith(stored)
        assert "\n" not in sentence


@pytest.mark.parametrize(
    ("backend", "sentence"),
    [
        ("vllm+vllm", "--backend vllm+vllm: names vllm twice"),
        ("vllm+sglan", "no backend 'sglan'. Did you mean 'sglang'?"),
        ("vllm+", "no backend ''."),
        ("vllm+fake", "--backend vllm+fake: fake is for no engine with kernels to choose from"),
        ("hf+vllm", "--backend hf+vllm: hf is for no engine with kernels to choose from"),
    ],
)
def test_what_cannot_be_joined_is_one_line(tmp_path: Path, backend: str, sentence: str) -> None:
    with pytest.raises(QplugError) as failure:
        qplug.quantize("qplug:demo", tmp_path / "out", backend=backend)
    assert str(failure.value).startswith(sentence)
    assert "\n" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_versions_stand_in_the_order_of_the_engines() -> None:
    exporter = REGISTRY.exporters.make(BOTH, {"engine": "0.26.0+0.5.16"})
    assert isinstance(exporter.engine, JoinedEngine)
    assert {row.engine for row in exporter.engine.capabilities()} == {"vLLM 0.26.0 + SGLang 0.5.16"}
    assert exporter.engine.servers == {"vLLM", "SGLang"}
    for version, sentence in (
        ("0.26.0", "name a version of each of vllm + sglang, as in engine=newest+newest"),
        ("0.26.0+9", "no table for version '9'"),
    ):
        with pytest.raises(QplugError) as failure:
            REGISTRY.exporters.make(BOTH, {"engine": version})
        assert sentence in str(failure.value)


def test_rows_are_those_of_both() -> None:
    tables = [
        [
            Capability("A", "one", True, (32, 64), 16, 24, "run on H100", ("sm80", "sm90")),
            Capability("B", "one", True, (), 16, 16, "not run; read", ("sm90",)),
            Capability("C", "one", True, (32,), 16, 16, "run on H100", ("sm90",)),
            Capability("D", "one alone", True, (), 1, 1, "run on H100", ("sm90",)),
        ],
        [
            Capability("A", "two", True, (64, -1), 24, 16, "run on H200", ("sm90", "cpu")),
            Capability("B", "it cannot", False, (), 1, 1, "run on H200", ("sm90",)),
            Capability("C", "two", True, (-1,), 16, 16, "run on H200", ("sm90",)),
        ],
    ]
    assert served_by_all(tables) == [
        Capability("A", "one; two", True, (64,), 48, 48, "run on H100; run on H200", ("sm90",)),
        Capability("B", "it cannot", False, (), 1, 1, "run on H200", ("sm90",)),
        Capability("C", "no size of groups fits both", False, devices=("sm90",)),
    ]


def test_limits_of_shapes_are_those_of_both() -> None:
    engine = REGISTRY.exporters[BOTH].engine
    assert engine is not None
    parts = [REGISTRY.exporters[name].engine for name in ("vllm", "sglang")]
    for row in engine.capabilities():
        mine = [
            each
            for part in parts
            for each in (part.capabilities() if part else ())
            if each.scheme == row.scheme and row.devices[0] in each.devices
        ]
        assert row.served == all(each.served for each in mine)
        if row.served:
            assert row.out_multiple == math.lcm(*(each.out_multiple for each in mine))


def test_a_folder_that_breaks_a_rule_of_one_is_unsound(
    quantized: Quantized, tmp_path: Path
) -> None:
    """SGLang looks up ``qkv_proj``, which vLLM takes apart itself."""
    out = copytree(quantized("W4A16", backend=BOTH, ignore=["*.self_attn.*"]), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = [entry for entry in ignore if "qkv" not in entry]
    (out / "config.json").write_text(json.dumps(config))
    forget_checksums(out)
    assert qplug.verify(str(out), backend="vllm").ok
    assert {problem.check for problem in qplug.verify(str(out)).problems} == {"merged"}


class House(Engine):
    """Merges up and down, and has one kernel."""

    releases: ClassVar[Any] = {
        "House 1.0": (Capability("W4A16", "own", True, (128,), 1, 1, "not run; mine", ("sm90",)),)
    }

    def merged(self, names: Sequence[str]) -> list[list[str]]:
        return [[name for name in names if name.endswith(("q_proj", "up"))]]


class HouseExporter(Exporter[Target]):
    """A backend that somebody else wrote."""

    name = "house"
    Params = Target
    format = CompressedTensors()
    engine = House()


def test_backends_of_other_plugins_are_joined_too() -> None:
    registry = registry_with(HouseExporter)
    exporter = registry.exporters.make("vllm+house")
    wide = exporter.refuses(view(up=(128, 128)), {"layers.0.up": preset("W4A16")})
    assert wide is None
    small = {"layers.0.up": preset("W4A16").with_group_size(32)}
    sentence = exporter.refuses(view(up=(128, 128)), small)
    assert sentence == "house: layers.0.up: own takes groups of 128, not 32"
    names = ["q_proj", "k_proj", "v_proj", "up", "down"]
    assert [sorted(group) for group in exporter.merged(names)] == [
        ["k_proj", "q_proj", "up", "v_proj"]
    ]
    assert {plugin.name for plugin in registry.exporters.owners("vllm+house")} >= {"vllm"}
