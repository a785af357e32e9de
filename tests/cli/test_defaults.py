"""A user's own defaults: of a file and of the environment; the command line and recipes win."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qplug.cli.defaults import default_map, defaults_file
from qplug.errors import QplugError

if TYPE_CHECKING:
    from click.testing import Result

    Cli = Callable[..., Result]

needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def file(text: str) -> Path:
        (tmp_path / "qplug.toml").write_text(text)
        return tmp_path / "qplug.toml"

    return file


def test_the_place_of_the_file(tmp_path: Path) -> None:
    assert defaults_file({}) == Path.home() / ".config/qplug.toml"
    assert defaults_file({"XDG_CONFIG_HOME": str(tmp_path)}) == tmp_path / "qplug.toml"


def test_nothing_is_set(tmp_path: Path) -> None:
    assert not any(default_map({"XDG_CONFIG_HOME": str(tmp_path)}).values())


@needs_toml
def test_the_environment_wins_over_the_file(tmp_path: Path, write: Callable[[str], Path]) -> None:
    write('device = "cpu"\nbackend = "vllm"\n')
    found = default_map({"XDG_CONFIG_HOME": str(tmp_path), "QPLUG_DEVICE": "cuda"})
    assert found["quantize"] == {"device": "cuda", "backend": "vllm"}
    assert found["eval"] == {"device": "cuda"}


@needs_toml
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("device = ", "is no TOML: "),
        ('devise = "cpu"', "unknown key 'devise'. Did you mean 'device'? There are: device, "),
        ("device = 3", "device must be a string in quotes"),
    ],
)
def test_a_file_that_is_wrong(
    text: str, told: str, write: Callable[[str], Path], tmp_path: Path, cli: Cli
) -> None:
    file = write(text)
    with pytest.raises(QplugError) as refused:
        default_map({"XDG_CONFIG_HOME": str(tmp_path)})
    assert str(refused.value).startswith(f"{file}: {told}")
    assert cli("plugins", "list").stderr.startswith(f"Error: {file}: {told}")


def test_quantize_takes_defaults_and_says_so(
    cli: Cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QPLUG_BACKEND", "fake")
    words = ("quantize", "--algo", "rtn", llama, "--out", tmp_path / "out")
    assert "[default: fake]" in cli("quantize", "-h").output
    done = cli(*words)
    assert done.exit_code == 0
    assert done.stderr.splitlines()[0] == "--backend fake: your default"
    assert json.loads((tmp_path / "out/qplug.json").read_text())["recipe"]["backend"] == "fake"
    typed = cli(*words, "--backend", "vllm", "--overwrite")
    assert typed.exit_code == 0
    assert "your default" not in typed.stderr
    assert json.loads((tmp_path / "out/qplug.json").read_text())["recipe"]["backend"] == "vllm"


def test_a_recipe_wins_over_defaults(
    cli: Cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QPLUG_BACKEND", "no-such-backend")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"model: {llama}\nbackend: fake\nexport:\n- {{out: {tmp_path / 'out'}}}\n")
    done = cli("quantize", "--config", recipe)
    assert done.exit_code == 0, done.output
    assert "your default" not in done.stderr


def test_a_default_device_is_the_device(
    cli: Cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QPLUG_DEVICE", "nonsense")
    assert (
        "--device nonsense: "
        in cli("quantize", "--algo", "rtn", llama, "--out", tmp_path / "out").stderr
    )
    assert (
        cli(
            "quantize", "--algo", "rtn", llama, "--out", tmp_path / "out", "--device", "cpu"
        ).exit_code
        == 0
    )
