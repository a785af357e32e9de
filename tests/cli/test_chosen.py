"""What the command chooses for a user who names no algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qplug import Dataset, NoParams, QplugError
from qplug.cli.chosen import better_dataset, chosen_algorithm, chosen_dataset
from qplug.output.unfinished import begun_dataset
from qplug.registry.registry import Registry
from qplug.testing.models import write_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from click.testing import Result

    from qplug import Split
    from qplug.recipe.words import RecipeWords

    Cli = Callable[..., Result]

QUICK = ("--samples", 2, "--seq-len", 16, "--device", "cpu", "--dry-run")


@pytest.mark.parametrize(
    ("words", "algorithm"),
    [
        ({}, "gptq"),
        ({"scheme": "W4A16_ASYM"}, "gptq"),
        ({"scheme": "int4"}, "gptq"),
        ({"scheme": "W3A16", "backend": "fake"}, "gptq"),
        ({"scheme": "W8A16"}, None),
        ({"scheme": "W8A8"}, None),
        ({"scheme": "FP8_DYNAMIC"}, None),
        ({"scheme": "NVFP4A16"}, "gptq"),
        ({"backend": "hf"}, None),
        ({"algo": "awq"}, None),
    ],
)
def test_few_bits_are_calibrated(words: dict[str, Any], algorithm: str | None) -> None:
    assert chosen_algorithm(words, Registry.installed()) == algorithm  # type: ignore[arg-type]


def test_the_choice_is_said(cli: Cli, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    (tmp_path / "mine.txt").write_text("some words of mine " * 99)
    words = ("--group-size", 32, "--backend", "vllm", "--out", tmp_path / "out", *QUICK)
    words += ("--dataset", "text", "--dataset-opt", f"path={tmp_path / 'mine.txt'}")
    chosen = cli("quantize", model, *words)
    assert chosen.exit_code == 0, chosen.output
    assert chosen.stderr.splitlines()[1].startswith("--algo gptq: chosen for W4A16, ")
    assert "becomes W4A16 by gptq" in chosen.stdout
    named = cli("quantize", model, "--algo", "rtn", *words)
    assert "chosen" not in named.stderr


class Offline(Dataset[NoParams]):
    """A text of the Hub, which cannot be reached."""

    name = "wikitext2"

    def documents(self, split: Split) -> Iterator[str]:
        raise QplugError("the Hub cannot be reached")


class Online(Dataset[NoParams]):
    """A text of the Hub, which can be reached."""

    name = "wikitext2"

    def documents(self, split: Split) -> Iterator[str]:
        return iter(["some text"])


@pytest.mark.parametrize(
    ("dataset", "name", "line"),
    [
        (Online, "wikitext2", "--dataset auto: wikitext2"),
        (
            Offline,
            "demo",
            "--dataset auto: demo, since wikitext2 cannot be read: the Hub cannot be reached",
        ),
    ],
)
def test_the_dataset_that_can_be_read(
    dataset: type[Dataset[NoParams]], name: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry.installed()
    monkeypatch.setattr(registry.datasets, "make", lambda name: dataset(NoParams()))
    assert chosen_dataset(registry) == (name, line)


@pytest.mark.slow
def test_auto_is_said_and_recorded_by_its_name(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qplug.cli.quantize.chosen_dataset", lambda registry: ("demo", "--dataset auto: demo")
    )
    model = write_tiny_model(tmp_path / "tiny")
    words = ("--algo", "awq", "--group-size", 32, "--backend", "fake", "--dataset", "auto")
    done = cli("quantize", model, *words, "--out", tmp_path / "out", *QUICK)
    assert done.exit_code == 0, done.output
    assert "--dataset auto: demo" in done.stderr.splitlines()
    assert "of demo." in done.stdout


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Plugins with a text of the Hub, which answers."""
    registry = Registry.installed()
    monkeypatch.setattr("qplug.cli.chosen.hub_answers", lambda seconds: True)
    monkeypatch.setattr(registry.datasets, "make", lambda name: Online(NoParams()))
    return registry


@pytest.mark.parametrize(
    ("words", "model", "better"),
    [
        ({"algo": "gptq"}, "some/model", "wikitext2"),
        ({"algo": "rtn", "scheme": "W8A8_STATIC"}, "some/model", "wikitext2"),
        ({"algo": "gptq"}, "qplug:demo", None),
        ({"algo": "rtn"}, "some/model", None),
        ({"algo": "gptq", "dataset": "demo"}, "some/model", None),
        ({"algo": "gptq", "dataset_options": {"path": "mine"}}, "some/model", None),
    ],
)
def test_a_model_of_ones_own_gets_a_text_of_the_hub(
    words: dict[str, Any], model: str, better: str | None, answering: Registry, tmp_path: Path
) -> None:
    chosen = better_dataset(words, model, tmp_path / "out", answering, overwrite=False)  # type: ignore[arg-type]
    assert (chosen and chosen[0]) == better


def test_the_default_stays_if_the_hub_cannot_be_read(
    answering: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: RecipeWords = {"algo": "gptq"}

    def better() -> tuple[str, str] | None:
        return better_dataset(words, "some/model", tmp_path / "out", answering, overwrite=False)

    with monkeypatch.context() as changed:
        for name in ("RANK", "LOCAL_RANK"):
            changed.setenv(name, "0")
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            changed.setenv(name, "2")
        assert better() is None
    line = "--dataset wikitext2: chosen, since --dataset is not given and the Hub answers"
    assert better() == ("wikitext2", line)
    monkeypatch.setattr(answering.datasets, "make", lambda name: Offline(NoParams()))
    assert better() is None
    monkeypatch.setattr("qplug.cli.chosen.hub_answers", lambda seconds: False)
    assert better() is None


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_run_that_was_begun_keeps_its_dataset(
    is_finished: bool,
    answering: Registry,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out = write_tiny_model(tmp_path / "tiny"), tmp_path / "out"
    words = ("--algo", "awq", "--group-size", 32, "--backend", "fake", "--out", out, *QUICK[:-1])
    with monkeypatch.context() as changed:
        changed.setattr("qplug.cli.chosen.hub_answers", lambda seconds: False)
        if not is_finished:
            changed.setattr("qplug.output.unfinished.Unfinished.publish", _interrupt)
        assert (cli("quantize", model, *words).exit_code == 0) == is_finished

    def better(*, overwrite: bool = False) -> str | None:
        chosen = better_dataset({"algo": "awq"}, str(model), out, answering, overwrite=overwrite)
        return chosen and chosen[0]

    assert begun_dataset(out) == "demo"
    assert better() is None
    assert better(overwrite=True) == "wikitext2"


def test_a_text_of_the_hub_stays_though_the_hub_is_gone(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub does not answer, as in all tests; the run was begun when it did."""
    monkeypatch.setattr("qplug.output.unfinished.begun_dataset", lambda out: "wikitext2")
    model, out = write_tiny_model(tmp_path / "tiny"), tmp_path / "out"
    words = ("--algo", "awq", "--group-size", 32, "--backend", "fake", "--out", out, *QUICK)
    done = cli("quantize", model, *words)
    assert f"--dataset wikitext2: as in the run that was begun in {out}" in done.stderr.splitlines()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_the_command_takes_is_said(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "--dataset demo: chosen, since it is the best"
    monkeypatch.setattr("qplug.cli.quantize.better_dataset", lambda *_, overwrite: ("demo", line))
    model = write_tiny_model(tmp_path / "tiny")
    words = ("--algo", "awq", "--group-size", 32, "--backend", "fake")
    done = cli("quantize", model, *words, "--out", tmp_path / "out", *QUICK)
    assert done.exit_code == 0, done.output
    assert line in done.stderr.splitlines()
