"""The tables of folders in docs/architecture.md are what the linter and the tree say."""

from __future__ import annotations

import re
import sys
from itertools import chain
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    tomllib = pytest.importorskip("tomli")


def floors(root: Path) -> list[list[str]]:
    """The folders on each floor of core, by the linter's layers, from the top down."""
    linter = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layered,) = (c for c in linter["contracts"] if c["name"] == "core is layered")
    assert layered["exhaustive"]
    return [layer.split(" | ") for layer in layered["layers"]]


def rows(root: Path, cells: int) -> list[list[str]]:
    """The rows of the table of folders that has so many columns, without its heading."""
    part = (root / "docs/architecture.md").read_text("utf-8").partition("## Folders")[2]
    lines = [line for line in part.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in found if len(row) == cells]


def names(cell: str) -> list[str]:
    return re.findall(r"`(.+?)`", cell)


def test_core_has_the_floors_that_the_table_has(root: Path) -> None:
    table = rows(root, 3)
    assert [names(row[0]) for row in table] == [[name] for name in chain(*floors(root))]
    assert all(purpose for _, _, purpose in table)
    said = {names(folder)[0]: imports for folder, imports, _ in table}
    below: list[str] = []
    for floor in reversed(floors(root)):
        for folder in floor:
            if said[folder] != "all below":
                assert names(said[folder]) == below, folder
        below = [*floor, *below]


def test_the_tree_has_the_folders_of_the_tables(root: Path) -> None:
    core = root / "core/qplug"
    packages = {path.parent.name for path in core.glob("*/__init__.py")}
    assert packages | {"errors"} == set(chain(*floors(root)))
    for row in rows(root, 2):
        assert all((root / folder).is_dir() for folder in names(row[0]))


def test_tests_mirror_the_tree(root: Path) -> None:
    def folders(path: Path) -> set[str]:
        return {inner.name for inner in path.iterdir() if any(inner.glob("**/test_*.py"))}

    core = set(chain(*floors(root))) - {"errors", "testing"}
    others = {"kit", "plugins", "docs", "engines", "fuzz", "kernels", "zoo"}
    assert folders(root / "tests") == core | others
    plugins = {path.name for path in (root / "plugins").iterdir() if path.is_dir()}
    assert folders(root / "tests/plugins") == plugins
