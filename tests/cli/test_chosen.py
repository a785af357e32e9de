"""What the command chooses for a user who names no algorithm, and what it warns of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qplug.cli.chosen import chosen_algorithm
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

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
        ({"scheme": "NVFP4"}, None),
        ({"backend": "hf"}, None),
        ({"algo": "awq"}, None),
    ],
)
def test_few_bits_are_calibrated(words: dict[str, Any], algorithm: str | None) -> None:
    assert chosen_algorithm(words, Registry.installed()) == algorithm  # type: ignore[arg-type]


def test_the_choice_is_said(cli: Cli, tmp_path: Path) -> None:
    chosen = cli("quantize", "qplug:demo", "--out", tmp_path / "out", *QUICK)
    assert chosen.exit_code == 0, chosen.output
    assert chosen.stderr.splitlines()[1].startswith("--algo gptq: chosen for W4A16, ")
    assert "becomes W4A16 by gptq" in chosen.stdout
    named = cli("quantize", "qplug:demo", "--algo", "rtn", "--out", tmp_path / "out", *QUICK)
    assert "chosen" not in named.stderr


def test_a_model_that_is_calibrated_on_the_documentation_of_python_is_warned_of(
    cli: Cli, tmp_path: Path
) -> None:
    from qplug.checkpoint.locate import find_model

    words = ("--algo", "awq", "--out", tmp_path / "out", *QUICK)
    (warning,) = (
        line
        for line in cli("quantize", find_model("qplug:demo"), *words).stderr.splitlines()
        if line.startswith("Warning: ")
    )
    assert "is calibrated on demo, which is Python's documentation" in warning
    assert "--dataset text --dataset-opt path=FILE" in warning
    (tmp_path / "mine.txt").write_text("some words of mine " * 99)
    own = ("--dataset", "text", "--dataset-opt", f"path={tmp_path / 'mine.txt'}")
    for quiet in (
        cli("quantize", "qplug:demo", *words),
        cli("quantize", find_model("qplug:demo"), *words, *own),
    ):
        assert quiet.exit_code == 0, quiet.output
        assert "Warning" not in quiet.stderr
