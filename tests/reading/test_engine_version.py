"""A folder is checked by the rules of the version that will load it, as far as that is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import qplug
from qplug import Engine, QplugError
from qplug.machine.engines import Installation
from qplug.machine.session import Session
from qplug.output.manifest import Manifest
from qplug.reading import engine_version
from qplug.reading.engine_version import choose_version, nearest_version
from qplug.reading.server import find_serving
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

KNOWN = ["A 1.10.0", "A 1.9.0", "A 0.32.0"]


@pytest.mark.parametrize(
    ("installed", "nearest"),
    [
        ("1.10.0", "1.10.0"),
        ("2.0", "1.10.0"),
        ("1.9.9", "1.9.0"),
        ("1.9.0.post1", "1.9.0"),
        ("1.9.0rc2", "1.9.0"),
        ("0.32.1+cpu", "0.32.0"),
        ("0.1", "0.32.0"),
        ("unknown", "0.32.0"),
    ],
)
def test_the_nearest_version(installed: str, nearest: str) -> None:
    assert nearest_version(KNOWN, installed) == nearest


@pytest.fixture
def sglang() -> Engine:
    engine = Registry.installed(only_shipped=True).exporters["sglang"].engine
    assert engine is not None
    return engine


def written_for(version: str | None) -> Manifest:
    options = {} if version is None else {"engine": version}
    recipe = {"backend_options": options}
    return Manifest("m", "sglang", (), {}, {}, {}, frozenset(), None, recipe=recipe)


def test_what_is_asked_for_comes_before_what_is_installed(
    sglang: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = choose_version(sglang, "sglang", written_for(None))
    assert str(newest) == "rules of SGLang 0.5.23: the newest that qplug knows"
    old = choose_version(sglang, "sglang", written_for("0.5.16"))
    assert str(old) == "rules of SGLang 0.5.16: the folder was written for it"
    assert choose_version(sglang, "vllm", written_for("0.5.16")).version == "newest"

    monkeypatch.setattr(
        engine_version, "find_engine", lambda package, python: Installation("0.5.20", python)
    )
    here = choose_version(sglang, "sglang", written_for(None), python="/its/python")
    assert str(here) == "rules of SGLang 0.5.16: 0.5.20 is installed"
    asked = choose_version(sglang, "sglang", written_for(None), asked="0.5.23")
    assert str(asked) == "rules of SGLang 0.5.23: asked for"
    with pytest.raises(QplugError, match=r"no table for version '0\.6' of the engine"):
        choose_version(sglang, "sglang", asked="0.6")


def test_two_engines_that_load_a_format_are_both_named() -> None:
    engine = Registry.installed(only_shipped=True).exporters["gptq"].engine
    assert engine is not None
    assert choose_version(engine, "gptq").releases == ("vLLM 0.33.0", "SGLang 0.5.23")
    assert choose_version(engine, "gptq", asked="0.5.16").releases == ("SGLang 0.5.16",)


def test_a_folder_remembers_the_version_that_it_was_written_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"backend": "sglang", "backend_options": {"engine": "0.5.16"}}
    qplug.quantize("qplug:demo", out, scheme="NVFP4", samples=2, seq_len=16, **options)
    assert qplug.verify(str(out)).rules == ("rules of SGLang 0.5.16: the folder was written for it")
    # So do the options of its server.
    assert "--fp4-gemm-backend" in find_serving(str(out), Session.alone()).arguments
    monkeypatch.setattr(
        engine_version, "find_engine", lambda package, python: Installation("0.5.23", python)
    )
    assert qplug.verify(str(out)).rules == "rules of SGLang 0.5.23: 0.5.23 is installed"
    assert "--fp4-gemm-backend" not in find_serving(str(out), Session.alone()).arguments
