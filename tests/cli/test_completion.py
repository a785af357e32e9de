"""The shell completes commands, options and the names of components, and waits for no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from click.shell_completion import ShellComplete

from qplug.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]


def completed(*words: str) -> list[str]:
    *before, begun = words
    shell = ShellComplete(main, {}, "qplug", "_QPLUG_COMPLETE")
    return [item.value for item in shell.get_completions(before, begun)]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["quan"], ["quantize"]),
        (["quantize", "--sch"], ["--scheme"]),
        (["quantize", "--algo", "g"], ["gptq"]),
        (["quantize", "--algo", "quarot+g"], ["quarot+gptq"]),
        (
            ["quantize", "--scheme", "FP8"],
            ["FP8", "FP8A16", "FP8A16_BLOCK", "FP8A16_TENSOR", "FP8_BLOCK", "FP8_DYNAMIC"],
        ),
        (["quantize", "--scheme", "int"], ["int4", "int8"]),
        (["quantize", "--scheme", "w8a8"], ["w8a8", "w8a8_static"]),
        (["quantize", "--backend", "v"], ["vllm"]),
        (["quantize", "--dataset", "text:9+pi"], ["text:9+pileval"]),
        (["quantize", "--sampling", "do"], ["documents"]),
        (["convert", "--backend", "aw"], ["awq"]),
        (["eval", "--dataset", "wiki"], ["wikitext2"]),
        (["verify", "--dataset", "wiki"], ["wikitext2"]),
        (["serve", "--backend", "sg"], ["sglang"]),
        (["schemes", "--backend", "sg"], ["sglang"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_values(words: list[str], values: list[str]) -> None:
    assert completed(*words) == values


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script(cli: Cli, shell: str) -> None:
    result = cli("completion", shell)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"_QPLUG_COMPLETE={shell}_complete" in result.stdout


def test_another_shell(cli: Cli) -> None:
    assert cli("completion", "fsh").stderr.endswith("Did you mean 'fish'?\n")
