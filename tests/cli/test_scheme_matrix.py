"""The matrix of ``qplug schemes``: what it says is what the tables of the engines say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import pytest

from qplug import PRESETS, Capability
from qplug.api.gpus import DEVICES
from qplug.cli.scheme_matrix import EMULATED, NO, UNKNOWN, WIDTH, YES, cell
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]


def test_the_matrix(cli: Cli) -> None:
    lines = cli("schemes").stdout.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].split() == ["awq", "gpt-oss", "gptq", "sglang", "vllm"]
    assert lines[1].split() == ["Am", "Ad", "Ho", "Bl", "CPU"] * 5
    assert [line.split()[0] for line in lines[2 : 2 + len(PRESETS)]] == list(PRESETS)
    at = lines[0].index("vllm")
    row = next(line for line in lines if line.startswith("NVFP4 "))
    assert row[at:].split() == ["e", "e", "e", "Y", "-"]
    assert "e      it loads, but inputs are not rounded" in "\n".join(lines)


def test_every_cell_is_what_the_tables_say(cli: Cli) -> None:
    lines = cli("schemes").stdout.splitlines()
    exporters = Registry.installed().only("exporter").exporters
    for name in lines[0].split():
        engine = exporters[name].engine
        assert engine is not None
        at = lines[0].index(name)
        for line in lines[2 : 2 + len(PRESETS)]:
            shown = [line[at + 3 * number : at + 3 * number + 1] for number in range(len(DEVICES))]
            scheme = line.split()[0]
            wanted = [cell(engine.capabilities(), scheme, device) for device in DEVICES]
            assert [sign or UNKNOWN for sign in shown] == wanted, (name, scheme)


def test_a_cell_shows_the_best_of_several_engines() -> None:
    rows = [
        Capability("W8A8", "no int8", False, devices=("sm100", "cpu")),
        Capability("W8A8", "Marlin, inputs stay as they are", devices=("sm100", "sm80")),
        Capability("W8A8", "Cutlass", devices=("sm80",)),
    ]
    signs = [cell(rows, "W8A8", device) for device in ("sm80", "sm100", "cpu", "sm90")]
    assert signs == [YES, EMULATED, NO, UNKNOWN]


def test_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from qplug.cli.main import main

    coloured = CliRunner().invoke(main, ["schemes"], color=True)
    assert "\x1b[32mY\x1b[0m" in coloured.stdout
    assert click.unstyle(coloured.stdout) == CliRunner().invoke(main, ["schemes"]).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in CliRunner().invoke(main, ["schemes"], color=True).stdout
