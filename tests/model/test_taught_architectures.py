"""A plugin teaches an architecture that is not known; what it says is held to the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import qplug
from qplug import ModelView, PluginError, QplugError, hookimpl
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]

EXAMPLE = Path(__file__).parents[2] / "examples" / "teach_architecture.py"
CONFIG = {
    "model_type": "stacked-mixer",
    "dtype": "bfloat16",
    "width": 64,
    "inner": 96,
    "depth": 2,
    "choices": 4,
}


@pytest.fixture
def mixer(tmp_path: Path) -> Path:
    """A checkpoint of an architecture that transformers does not have."""
    folder = tmp_path / "mixer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    shapes = {"mix": (64, 64), "widen": (96, 64), "narrow": (64, 96), "chooser": (4, 64)}
    torch.manual_seed(0)
    tensors = {f"stack.{n}.{k}.weight": torch.randn(s) for n in range(2) for k, s in shapes.items()}
    tensors["words.weight"] = torch.randn(10, 64)
    save_file({name: t.bfloat16() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def test_the_example_teaches_one(mixer: Path, tmp_path: Path, cli: Cli) -> None:
    words = (
        "quantize",
        "--algo",
        "rtn",
        mixer,
        "--group-size",
        32,
        "--backend",
        "compressed-tensors",
    )
    unknown = cli(*words, "--out", tmp_path / "out")
    assert unknown.exit_code == 1
    assert "unknown architecture" in unknown.output
    done = cli("--plugin", EXAMPLE, *words, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "6 layers" in done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")
    assert config == CONFIG
    verified = cli("--plugin", EXAMPLE, "verify", tmp_path / "out")
    assert verified.exit_code == 0, verified.output
    inspected = cli("--plugin", EXAMPLE, "inspect", tmp_path / "out", "--json")
    floats = json.loads(inspected.output)["float linears"]
    assert floats == ["stack.0.chooser", "stack.1.chooser"]


class Teaching:
    """Says of every model what it is given, or what that makes of the right view."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @hookimpl
    def qplug_model_view(self, config: Mapping[str, Any]) -> ModelView | None:
        view: ModelView | None = self.answer(right(config))
        return view


def right(config: Mapping[str, Any]) -> ModelView:
    registry = Registry.installed(files=[EXAMPLE])
    (found,) = [call(config=config) for _, call in registry.implementing("qplug_model_view")]
    view: ModelView = found
    return view


def quantize(model: Path, *answers: Any) -> qplug.Result:
    registry = Registry.installed()
    for number, answer in enumerate(answers):
        registry = registry.with_(Teaching(answer), f"teacher-{number}")
    out = model.with_name("out")
    return qplug.quantize(str(model), out, group_size=32, backend="fake", registry=registry)


def test_the_first_that_knows_is_believed(mixer: Path) -> None:
    def fewer(view: ModelView) -> ModelView:
        return replace(view, quantizable=frozenset({"stack.0.mix"}))

    assert set(quantize(mixer, lambda view: None, fewer, lambda view: view).errors) == {
        "stack.0.mix"
    }


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda view: {}, "must return a ModelView or None"),
        (lambda view: replace(view, blocks=()), "names no blocks"),
        (lambda view: replace(view, blocks=("x",)), "in none of its blocks"),
        (lambda view: replace(view, quantizable=frozenset({"x"})), "but not in linears"),
        (
            lambda view: replace(view, linears={"stack.0.mix": (1, 2)}, quantizable=frozenset()),
            r"stack\.0\.mix\.weight should be \[1, 2\], but is \[64, 64\]",
        ),
        (
            lambda view: replace(view, linears={"x": (1, 2)}, quantizable=frozenset()),
            r"x\.weight should be \[1, 2\], but is not there",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_the_plugin(mixer: Path, answer: Any, sentence: str) -> None:
    with pytest.raises(QplugError, match=f"plugin teacher-0 .*: qplug_model_view: .*{sentence}"):
        quantize(mixer, answer)


def test_one_that_breaks_is_no_reason_to_guess(mixer: Path) -> None:
    with pytest.raises(PluginError, match=r"plugin teacher-0 .*: ZeroDivisionError"):
        quantize(mixer, lambda view: 1 / 0)


def test_a_model_that_is_known_is_found_without_one(llama: Path) -> None:
    assert len(quantize(llama, lambda view: None).errors) == 14
