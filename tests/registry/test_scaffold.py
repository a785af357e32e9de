"""``qplug plugins new`` writes packages that install, are found, work, and pass their tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]

ROOT = Path(__file__).parents[2]

KINDS = {
    "algorithm": "my-rounding",
    "dataset": "my-text",
    "exporter": "my-format",
    "command": "my-sizes",
    "hook": "my-summary",
    "architecture": "my-mixer",
}
QUICK = ("--samples", 2, "--seq-len", 32, "--device", "cpu")


@pytest.mark.slow
def test_the_whole_round_of_all_kinds(tmp_path: Path, cli: Cli, environment: Any) -> None:
    folders = []
    for kind, name in KINDS.items():
        result = cli("plugins", "new", name, "--kind", kind, "--folder", tmp_path / name)
        assert result.exit_code == 0, result.output
        folders.append(tmp_path / name)
    environment.install(*folders)
    found = environment.run("-m", "qplug", "plugins", "list", folder=tmp_path)
    assert all(f"qplug-{name} 0.1.0" in found for name in KINDS.values())
    environment.run(
        *("-m", "qplug", "quantize", "qplug:demo", "--out", "out", *QUICK),
        *("--algo", "awq+my-rounding", "--dataset", "my-text"),
        *("--scheme", "W8A16", "--backend", "my-format", "-o", "my-rounding.range=0.9"),
        folder=tmp_path,
    )
    assert "my-format" in (tmp_path / "out" / "config.json").read_text()
    assert "bytes in " in (tmp_path / "out.my-summary.txt").read_text()
    assert " x " in environment.run("-m", "qplug", "my-sizes", "out", folder=tmp_path)
    environment.run("-m", "qplug", "plugins", "check", folder=tmp_path)
    tests = [folder / "tests" for folder in folders]
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *tests)
    told = environment.run(*words, "--import-mode=importlib", folder=tmp_path)
    assert "failed" not in told
    assert "passed" in told


def test_what_is_printed_is_what_to_do_next(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("plugins", "new", "mine", "--kind", "algorithm")
    assert "pip install -e 'qplug-mine[test]' && pytest qplug-mine" in result.output
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {
        "qplug-mine/pyproject.toml",
        "qplug-mine/README.md",
        "qplug-mine/LICENSE",
        "qplug-mine/.gitignore",
        "qplug-mine/.github/workflows/test.yml",
        "qplug-mine/qplug_mine/__init__.py",
        "qplug-mine/qplug_mine/mine.py",
        "qplug-mine/qplug_mine/py.typed",
        "qplug-mine/tests/test_contract.py",
    }
    assert '"qplug>=0.1,<0.2"' in (tmp_path / "qplug-mine/pyproject.toml").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_each_package_has_a_licence_and_a_workflow(tmp_path: Path, cli: Cli, kind: str) -> None:
    folder = tmp_path / "new"
    result = cli("plugins", "new", KINDS[kind], "--kind", kind, "--folder", folder)
    assert result.exit_code == 0, result.output
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    workflow = yaml.safe_load((folder / ".github/workflows/test.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["tests"]["steps"] if "run" in step]
    assert steps == ["pip install -e '.[test]'", "qplug plugins check", "pytest"]
    assert "${{ matrix.python }}" in (folder / ".github/workflows/test.yml").read_text()
    for file in folder.rglob("*.py"):
        compile(file.read_text(), str(file), "exec")
        assert all(len(line) <= 100 for line in file.read_text().splitlines()), file


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("MyIdea", "lower case"),
        ("my_idea", "lower case"),
        ("../up", "lower case"),
        ("random", "a module of Python itself"),
        ("awq", "is taken by plugin awq (qplug"),
        ("compressed-tensors", "is taken by plugin"),
    ],
)
def test_names_that_cannot_be_taken(tmp_path: Path, cli: Cli, name: str, sentence: str) -> None:
    result = cli("plugins", "new", name, "--kind", "dataset", "--folder", tmp_path / "new")
    assert result.exit_code == 1
    assert sentence in result.output
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_taken(tmp_path: Path, cli: Cli) -> None:
    kind = ("--kind", "dataset", "--folder")
    assert "exists; choose" in cli("plugins", "new", "mine", *kind, tmp_path).output
    nowhere = tmp_path / "no" / "where"
    assert "no such folder" in cli("plugins", "new", "mine", *kind, nowhere).output
    assert list(tmp_path.iterdir()) == []
