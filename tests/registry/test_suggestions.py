"""Which algorithms plugins suggest, and what follows for a user who names none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import pytest

from qplug import Suggestion, hookimpl, preset
from qplug.planning.measured import LOSSES
from qplug.registry.registry import Registry
from qplug.registry.suggestions import better_algorithm, suggestions, usual_algorithm


class Mine:
    """A plugin with a better algorithm for integers of few bits, which needs gptq, too."""

    @hookimpl
    def qplug_suggestions(self) -> Iterable[Suggestion]:
        return [
            Suggestion("mine+gptq", "few-bit integers", loss=0.4, usual=True),
            Suggestion("rtn+nothing", "few-bit integers", loss=0.1),
        ]


@pytest.mark.parametrize(
    ("scheme", "algorithm"),
    [("W4A16", "gptq"), ("W3A16", "gptq"), ("W8A16", "rtn"), ("W8A8", "rtn"), ("FP8", "rtn")],
)
def test_the_usual_algorithm_of_a_scheme(scheme: str, algorithm: str) -> None:
    assert usual_algorithm(preset(scheme), Registry.installed()) == algorithm


def test_four_bit_floats_have_one_usual_algorithm() -> None:
    registry = Registry.installed()
    names = ("NVFP4", "NVFP4A16", "MXFP4A16")
    assert {usual_algorithm(preset(name), registry) for name in names} == {"gptq"}
    measured = {LOSSES[name].algorithm for name in names[1:]}  # which a plan proposes
    assert measured == {"gptq"}


def test_a_plugin_can_suggest_a_better_one() -> None:
    registry = Registry.installed().with_(Mine())
    assert usual_algorithm(preset("W4A16"), registry) == "mine+gptq"
    assert usual_algorithm(preset("W8A16"), registry) == "rtn"
    # An algorithm that is not installed is not proposed.
    assert better_algorithm("awq", preset("W4A16"), registry) == "gptq"


@pytest.mark.parametrize(
    ("used", "scheme", "better"),
    [
        ("rtn", "W4A16", "gptq"),
        ("awq", "W4A16", "gptq"),
        ("gptq", "W4A16", None),
        ("signround", "W4A16", None),
        ("rtn", "W8A8", "smoothquant"),
        ("smoothquant", "W8A8", None),
        ("rtn", "W8A16", None),
    ],
)
def test_only_a_smaller_loss_is_better(used: str, scheme: str, better: str | None) -> None:
    assert better_algorithm(used, preset(scheme), Registry.installed()) == better


@pytest.mark.parametrize("answer", ["gptq", Suggestion("gptq", "few bits", loss=0.5)])  # type: ignore[arg-type]
def test_a_wrong_suggestion_is_an_error_of_its_plugin(answer: object) -> None:
    class Wrong:
        @hookimpl
        def qplug_suggestions(self) -> list[object]:
            return [answer]

    registry = Registry.installed().with_(Wrong(), "wrong")
    assert suggestions(preset("W4A16"), registry)[0].algorithms == "gptq"
    (plugin,) = (plugin for plugin in registry.plugins if plugin.name == "wrong")
    assert "qplug_suggestions" in str(plugin.error)


def test_suggestions_need_no_torch() -> None:
    code = (
        "import sys; from qplug.api.scheme import preset; from qplug.registry.registry import "
        "Registry; from qplug.registry.suggestions import usual_algorithm; "
        "usual_algorithm(preset('W4A16'), Registry.installed()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
