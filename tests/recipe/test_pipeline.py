"""Which algorithms go together, by what each says of itself; refused before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import qplug
from qplug import Algorithm, NoParams, QplugError, Scheme, preset
from qplug.recipe.pipeline import check_pipeline, make_pipeline
from qplug.registry.registry import Registry


def names(algo: str, scheme: str = "W8A8", **options: dict[str, object]) -> list[str]:
    registry = Registry.installed()
    pipeline = make_pipeline(algo.split("+"), options, [preset(scheme)], registry)
    return [algorithm.name for algorithm in pipeline]


@pytest.mark.parametrize(
    ("algo", "scheme"),
    [
        ("quarot+gptq", "W8A8"),
        ("quarot+gptq", "W4A4"),
        ("quarot+awq+gptq", "W4A16"),
        ("spinquant+gptq", "W4A4"),
        ("quarot+smoothquant", "W8A8"),
        ("smoothquant+gptq", "W8A8"),
        ("smoothquant+gptq", "FP8_DYNAMIC"),
        ("osplus+gptq", "W8A8"),
        ("awq+gptq", "W4A16"),
        ("awq+hqq", "W4A16"),
        ("quarot+hqq", "W4A16"),
        ("smoothquant+rtn", "W8A8"),
    ],
)
def test_what_goes_together(algo: str, scheme: str) -> None:
    assert names(algo, scheme) == algo.split("+")


@pytest.mark.parametrize(
    ("algo", "scheme", "reason"),
    [
        ("smoothquant+awq", "W8A8", "smoothquant and awq both decide the scales of inputs"),
        ("awq+osplus+gptq", "W8A8", "awq and osplus both decide the scales of inputs"),
        ("gptq+hqq", "W4A16", "gptq and hqq both choose codes"),
        ("gptq+awq", "W4A16", "--algo gptq+awq: gptq chooses codes, so it comes after awq"),
        ("awq+quarot", "W8A8", "quarot rewrites the float model, so it comes before awq"),
        ("smoothquant", "W4A16", "smoothquant: makes inputs easy to round, but W4A16 does"),
        ("osplus+gptq", "W8A16", "osplus: makes inputs easy to round, but W8A16 does"),
        ("quarot+spinquant", "W4A4", "both decide the rotation of the stream"),
        ("spinquant+gptq", "W4A16", "spinquant: learns from the errors of rounded inputs"),
        ("hqq", "FP8_BLOCK", "hqq: solves for integer grids"),
    ],
)
def test_what_makes_no_sense(algo: str, scheme: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(QplugError) as caught:
        qplug.quantize("no/such-model", tmp_path / "out", algo=algo, scheme=scheme, backend="fake")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_clips_alone_settle_no_scales() -> None:
    assert names("smoothquant+awq", awq={"scale": False}) == ["smoothquant", "awq"]


def test_a_scheme_of_some_layers_is_enough() -> None:
    """Inputs that some linears round are worth smoothing."""
    schemes = [preset("W4A16"), preset("W8A8")]
    assert make_pipeline(["smoothquant"], {}, schemes, Registry.installed())


def test_what_others_say_counts() -> None:
    """Core knows no name: it is what a plugin says of itself."""

    class Mine(Algorithm[NoParams]):
        """Settle what AWQ settles."""

        name = "mine"

        @property
        def decides(self) -> frozenset[str]:
            return frozenset({"the scales of inputs"})

        def refuses(self, schemes: Sequence[Scheme]) -> str | None:
            return "does not like it" if schemes[0].name == "W8A16" else None

    awq = make_pipeline(["awq"], {}, [preset("W4A16")], Registry.installed())
    with pytest.raises(QplugError, match="awq and mine both decide the scales of inputs"):
        check_pipeline([*awq, Mine(NoParams())], [preset("W4A16")], Registry.installed())
    with pytest.raises(QplugError, match=r"^mine: does not like it$"):
        check_pipeline([Mine(NoParams())], [preset("W8A16")], Registry.installed())
