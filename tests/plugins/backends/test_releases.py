"""Releases of an engine stand side by side as data; formats and engines are put together freely."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest

import qplug
from qplug import Capability, Engine, Exporter, Format, ModelView, QplugError, Target, preset
from qplug.api.capability import releases_at
from qplug.registry.registry import Registry
from qplug.testing import ExporterContract, registry_with
from qplug_compressed_tensors.engine import CompressedTensorsLoader
from qplug_compressed_tensors.format import CompressedTensors
from qplug_gptq_format.exporter import GPTQLoader
from qplug_sglang.exporter import SGLangExporter
from qplug_vllm.capabilities import RELEASES, VLLM_0_32, VLLM_0_33
from qplug_vllm.exporter import VLLMExporter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    Cli = Callable[..., Result]


class House(CompressedTensorsLoader):
    """An engine of a third party, in two releases."""

    releases: ClassVar = {
        "House 2.0": (
            Capability("W8A8", "new int8", True, (), 16, 16, "not run", ("sm90",)),
            Capability("FP8", "new fp8", True, (), 16, 16, "not run", ("sm90",)),
        ),
        "House 1.0": (
            Capability("W8A8", "old int8", True, (), 64, 64, "not run", ("sm80", "sm90")),
            Capability("FP8", "no fp8 before 2.0", False, devices=("sm90",)),
            Capability("W4A16", "old int4", True, (128,), 64, 64, "not run", ("cpu", "sm80")),
        ),
    }


class HouseExporter(Exporter[Target]):
    """What the house serves."""

    name = "house"
    Params = Target
    format = CompressedTensors()
    engine = House()


class TestHouse(ExporterContract):
    """Made of a format that exists, and of an engine of its own."""

    exporter = HouseExporter
    served = ("W8A8", None)
    shape = (128, 256)

    def model(self, folder: Path) -> str:
        return "qplug:demo"


def kernels(version: str = "newest") -> dict[tuple[str, str], str]:
    rows = House().at(version).capabilities()
    return {(row.scheme, device): row.kernel for row in rows for device in row.devices}


def test_the_newest_release_is_told_and_older_ones_where_it_says_nothing() -> None:
    newest = {
        ("W8A8", "sm90"): "new int8",
        ("W8A8", "sm80"): "old int8",
        ("FP8", "sm90"): "new fp8",
        ("W4A16", "sm80"): "old int4",
        ("W4A16", "cpu"): "old int4",
    }
    assert kernels() == kernels("2.0") == newest
    assert kernels("1.0") == {
        ("W8A8", "sm80"): "old int8",
        ("W8A8", "sm90"): "old int8",
        ("FP8", "sm90"): "no fp8 before 2.0",
        ("W4A16", "sm80"): "old int4",
        ("W4A16", "cpu"): "old int4",
    }
    released = {(row.kernel, row.engine) for row in House().capabilities()}
    assert ("new int8", "House 2.0") in released
    assert ("old int8", "House 1.0") in released
    with pytest.raises(
        QplugError, match=r"no table for version '3\.0' of the engine; there are: House 2\.0, "
    ):
        House().at("3.0")


def test_refusals_take_the_newest_release_unless_one_is_named() -> None:
    linears = {"layers.0.up": (80, 128)}
    view = ModelView({}, "bfloat16", linears, frozenset(linears), ("layers.0",), None)

    def refusal(scheme: str, target: Target) -> str | None:
        return HouseExporter(target).refuses(view, dict.fromkeys(linears, preset(scheme)))

    assert refusal("W8A8", Target("sm90")) is None
    assert refusal("FP8", Target("sm90")) is None
    old = Target("sm90", engine="1.0")
    assert refusal("FP8", old) == "layers.0.up: no fp8 before 2.0"
    assert str(refusal("W8A8", old)).endswith("out_features in multiples of 64, not 80")
    assert str(refusal("W8A8", Target("sm80"))).endswith("multiples of 64, not 80")


def test_a_run_is_refused_for_the_release_that_is_named(tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": "house", "registry": registry_with(HouseExporter)}
    with pytest.raises(QplugError, match=r"house: model\.layers\.0\..*: no fp8 before 2\.0"):
        qplug.quantize(
            "qplug:demo",
            tmp_path / "out",
            scheme="FP8",
            backend_options={"gpu": "sm90", "engine": "1.0"},
            **options,
        )
    assert not list(tmp_path.iterdir())


def test_releases_of_vllm_stand_side_by_side() -> None:
    assert [*RELEASES] == ["vLLM 0.33.0", "vLLM 0.32.0", "vLLM 0.26.0"]
    engine = VLLMExporter.engine
    # On GPUs all is of the newest. CPUs have another wheel, and what was run there was in 0.32.
    newest = engine.capabilities()
    assert len(newest) == len(VLLM_0_33) + len(VLLM_0_32)
    assert {row.engine for row in newest if "cpu" not in row.devices} == {"vLLM 0.33.0"}
    assert {row.engine for row in engine.at("0.32").capabilities()} == {
        "vLLM 0.32.0",
        "vLLM 0.26.0",
    }
    assert {row.engine for row in engine.at("0.26").capabilities()} == {"vLLM 0.26.0"}


def test_a_version_is_a_number_or_its_beginning() -> None:
    releases = ["A 1.10.0", "A 1.9.2", "A 1.9.1", "A 1.1", "B 1.9.1"]
    assert releases_at(releases) == {"A": releases[:4], "B": ["B 1.9.1"]}
    assert releases_at(releases, "1.9") == {"A": releases[1:4], "B": ["B 1.9.1"]}
    assert releases_at(releases, "1.9.2") == {"A": releases[1:4]}
    assert releases_at(releases, "1.1") == {"A": ["A 1.1"]}  # not 1.10
    assert releases_at(releases, "1") == releases_at(releases)
    for unknown in ("1.9.", "2", ""):
        with pytest.raises(QplugError, match=r"there are: A 1\.10\.0, A 1\.9\.2, "):
            releases_at(releases, unknown)


def test_an_engine_in_another_version_leaves_the_first_alone() -> None:
    house = House()
    assert next(row.kernel for row in house.capabilities()) == "new int8"
    older = house.at("1.0")
    assert next(row.kernel for row in older.capabilities()) == "old int8"
    assert next(row.kernel for row in house.capabilities()) == "new int8"
    assert older.at("newest").capabilities() == house.capabilities()
    assert older.release == "House 1.0"


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_every_row_of_a_loader_is_of_a_release(name: str) -> None:
    engine = Registry.installed(only_shipped=True).exporters[name].engine
    assert isinstance(engine, CompressedTensorsLoader)
    assert {*engine.loaders} <= {*engine.releases}
    assert all(loader.source for loader in engine.loaders.values())
    oldest = [*engine.releases][-1]
    assert oldest in engine.loaders


def test_what_was_run_in_an_older_version_is_only_read_in_the_newest() -> None:
    registry = Registry.installed(only_shipped=True)
    for name in registry.exporters:
        engine = registry.exporters[name].engine
        for release in ("vLLM 0.33.0", "SGLang 0.5.23"):
            for row in engine.releases.get(release, ()) if engine else ():
                assert row.evidence == f"not run; read from the source of {release.split()[1]}"


def test_engines_of_two_names_that_load_one_folder_do_not_stand_in_for_each_other() -> None:
    cells = [
        (row.scheme, device, row.engine.partition(" ")[0])
        for row in GPTQLoader().capabilities()
        for device in row.devices
    ]
    assert len(set(cells)) == len(cells)
    assert {engine for scheme, device, engine in cells if (scheme, device) == ("W4A16", "cpu")} == {
        "vLLM",
        "SGLang",
    }


def test_vllm_and_sglang_share_a_format_that_neither_is() -> None:
    for exporter in (VLLMExporter, SGLangExporter):
        assert isinstance(exporter.format, Format)
        assert not isinstance(exporter.engine, Format)
        assert not isinstance(exporter.format, Engine)
    assert VLLMExporter.format == CompressedTensors()


def test_what_has_no_format_is_no_exporter() -> None:
    class Bare(Exporter[Target]):
        """Names nothing."""

        name = "bare"

    class Mistaken(HouseExporter):
        """Names a class."""

        name = "mistaken"
        engine = House  # type: ignore[assignment]

    for kind, sentence in (
        (Bare, "Bare.format must be an object of a subclass of Format"),
        (Mistaken, "Mistaken.engine must be an object of a subclass of Engine, or None"),
    ):
        registry = registry_with(kind)
        with pytest.raises(QplugError, match="Broken plugins: under-test"):
            registry.exporters[kind.name]
        (broken,) = [plugin for plugin in registry.plugins if plugin.error]
        assert isinstance(broken.error, TypeError)
        assert str(broken.error).endswith(sentence)
