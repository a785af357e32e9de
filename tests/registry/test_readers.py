"""Readers that plugins offer: found, named in errors, and never two for one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

from qplug import QplugError, Reader, Registry, StoredTensor, hookimpl, open_checkpoint
from qplug.errors import PluginError, StageError
from qplug.testing import bare_registry

Answer = tuple[dict[str, Any], dict[str, StoredTensor]]


class Doubled(Reader):
    """Reads folders whose quant_method is doubled."""

    name = "doubled"

    def reads(self, config: Mapping[str, Any]) -> bool:
        return self.quantization(config).get("quant_method") == "doubled"

    def as_float(self, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Answer:
        return self.without_quantization(config), dict(tensors)


class Plugin:
    """A plugin that offers ``readers``."""

    def __init__(self, *readers: object) -> None:
        self._readers = readers

    @hookimpl
    def qplug_readers(self) -> list[Any]:
        return list(self._readers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    told = {"quantization_config": {"quant_method": "doubled"}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    return tmp_path


def test_a_reader_of_a_plugin_reads(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, readers=bare_registry(Plugin(Doubled())).sources)
    assert (checkpoint.config, checkpoint.quantized) == ({}, "doubled")
    assert "quantization_config" in open_checkpoint(folder).config


def test_two_readers_of_one_folder(folder: Path) -> None:
    class Other(Doubled):
        """The same."""

        name = "other"

    registry = bare_registry(Plugin(Doubled()), Plugin(Other()))
    with pytest.raises(QplugError, match=r"the readers doubled and other all read it; .* -p no:"):
        open_checkpoint(folder, readers=registry.sources)


@pytest.mark.parametrize("method", ["reads", "as_float", "describe"])
@pytest.mark.parametrize("error", [ValueError("oh"), SystemExit(3)], ids=["bug", "exit"])
def test_a_reader_that_raises_is_named(
    folder: Path, method: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Reader, *_: object) -> None:
        raise error

    class Bad(Doubled):
        """Raises."""

    monkeypatch.setattr(Bad, method, fail)
    registry = bare_registry(Plugin(Bad()))
    with pytest.raises(
        (StageError, PluginError), match=r"^plugin (doubled|plugin-0) \(an object\): "
    ):
        open_checkpoint(folder, readers=registry.sources)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "must return a configuration and tensors"),
        (([], {}), "must return a mapping as configuration"),
        (({}, {"w": torch.ones(2)}), "must return StoredTensors by name"),
    ],
)
def test_a_wrong_answer_names_the_plugin(folder: Path, answer: object, says: str) -> None:
    class Bad(Doubled):
        """Answers wrongly."""

        def as_float(self, *_: object) -> Any:
            return answer

    with pytest.raises(StageError, match=says):
        open_checkpoint(folder, readers=bare_registry(Plugin(Bad())).sources)


def test_an_offer_that_is_no_reader() -> None:
    class Nameless(Doubled):
        """Has no good name."""

        name = "No Name"

    for offer, says in ((Doubled, "is not an object of"), (Nameless(), "must be lower case")):
        (plugin,) = bare_registry(Plugin(offer)).load().plugins
        assert says in str(plugin.error)


def test_readers_are_listed_and_described(cli: Callable[..., Result]) -> None:
    assert {"awq", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4"} <= {
        *Registry.installed().readers
    }
    assert "reader gptq" in cli("plugins", "check").stdout
    shown = cli("plugins", "show", "mxfp4").stdout
    assert shown.startswith("reader mxfp4\nfrom plugin readers")
