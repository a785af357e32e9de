"""Other spellings that the command line takes, and the names that it suggests for wrong ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import pytest

from qplug.api.scheme import ALIASES, PRESETS, preset
from qplug.cli.choice import Choice
from qplug.cli.main import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    Cli = Callable[..., Result]


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_h_is_help(cli: Cli, name: str) -> None:
    words = [name] if name else []
    short, long = cli(*words, "-h"), cli(*words, "--help")
    assert (short.exit_code, short.output) == (0, long.output)
    assert "-h, --help" in short.output


def test_h_is_help_of_an_inner_command(cli: Cli) -> None:
    assert cli("plugins", "show", "-h").output.startswith("Usage: qplug plugins show")


def test_aliases_are_schemes() -> None:
    assert {alias: preset(alias).name for alias in ALIASES} == ALIASES
    assert not ALIASES.keys() & PRESETS.keys()
    assert (preset("FP8").name, preset("fp8").name) == ("FP8", "FP8_DYNAMIC")


def test_the_output_names_the_scheme_of_an_alias(cli: Cli, llama: Path, tmp_path: Path) -> None:
    words = ("--scheme", "int4", "--override", "*.down_proj=int8", "--override", "*.x*=W4A16")
    result = cli("quantize", "--algo", "rtn", llama, "--out", tmp_path / "out", *words, "--dry-run")
    assert result.stderr.splitlines()[:2] == ["int4 is the scheme W4A16", "int8 is the scheme W8A8"]


def test_a_wrong_choice_suggests_the_nearest() -> None:
    choice = Choice(["minmax", "moving-average", "histogram"])
    with pytest.raises(click.BadParameter, match=r"'histogram'\. Did you mean 'histogram'\?$"):
        choice.convert("histgram", None, None)
    with pytest.raises(click.BadParameter, match=r"'histogram'\.$"):
        choice.convert("xyz", None, None)


def test_a_wrong_choice_on_the_command_line(cli: Cli) -> None:
    result = cli("quantize", "qplug:demo", "--out", "out", "--sampling", "window")
    assert result.exit_code == 2
    assert result.stderr.endswith("Did you mean 'windows'?\n")
