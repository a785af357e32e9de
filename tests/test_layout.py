"""The lists in pyproject.toml, the folders, and what keeps source roots from being packages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from api_page import DOORS

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {path.name for path in (ROOT / "plugins").glob("*/qplug_*") if path.is_dir()}


def test_every_plugin_has_an_entry_point() -> None:
    assert set(PROJECT["project"]["entry-points"]["qplug"].values()) == PACKAGES


def test_every_plugin_is_type_checked_and_held_to_the_architecture() -> None:
    assert PROJECT["tool"]["mypy"]["files"] == ["core", "plugins"]
    linter = PROJECT["tool"]["importlinter"]
    assert set(linter["root_packages"]) == {"qplug", *PACKAGES}
    contracts = {contract["name"]: contract for contract in linter["contracts"]}
    assert contracts["core knows no plugin"]["forbidden_modules"] == ["*"]
    protected = contracts["a plugin opens public doors alone"]["protected_modules"]
    inner = {f"{door}.*" for door in DOORS if (ROOT / "core" / door.replace(".", "/")).is_dir()}
    modules = {f"qplug.{path.stem}" for path in (ROOT / "core/qplug").iterdir() if _is_code(path)}
    assert set(protected) == modules - set(DOORS) | inner - {"qplug.*"}


def _is_code(path: Path) -> bool:
    """Whether ``path`` is a module or a package that others can import."""
    return (path.suffix == ".py" and path.stem.strip("_") == path.stem) or (
        path / "__init__.py"
    ).exists()


def test_no_source_root_is_a_package() -> None:
    roots = [ROOT / root for root in PROJECT["tool"]["hatch"]["build"]["dev-mode-dirs"]]
    assert all(root.is_dir() for root in roots)
    for folder in {*roots, *(root.parent for root in roots)}:
        assert not (folder / "__init__.py").exists()


def test_every_package_is_typed_and_described() -> None:
    for package in [ROOT / "core/qplug", *(ROOT / "plugins").glob("*/qplug_*")]:
        assert (package / "py.typed").exists(), package
        assert (package / "__init__.py").read_text().startswith('"""'), package


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = re.compile(r"(utils?|helpers?|common|misc)\.py$")
    folders = ["core", "plugins", "tests", "tools", "examples", "benchmarks"]
    modules = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(modules) > 50
    assert not [path for path in modules if empty.search(path.name)]


def test_what_ships_is_small() -> None:
    demo = sum(path.stat().st_size for path in (ROOT / "core/qplug/demo").iterdir())
    assert demo < 10_000_000


def test_no_file_has_the_marks_of_an_unfinished_merge() -> None:
    folders = ("core", "plugins", "tests", "docs", "benchmarks", "changes", "tools", "examples")
    texts = [path for folder in folders for path in (ROOT / folder).rglob("*") if _is_text(path)]
    assert len(texts) > 500
    marked = [path for path in texts if re.search(r"^(<{7}|>{7}) ", path.read_text(), re.M)]
    assert not marked


def _is_text(path: Path) -> bool:
    return path.suffix in (".py", ".md", ".toml", ".json", ".yml", ".css", ".sh")
