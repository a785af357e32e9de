"""The public names: each is there, is written on, and stands on the page on the Python API."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from api_page import DOORS, prose, undocumented


@pytest.mark.parametrize("door", DOORS)
def test_a_door_shows_its_names_and_the_page_has_them(door: str, root: Path) -> None:
    module = importlib.import_module(door)
    assert sorted(set(module.__all__)) == sorted(module.__all__) == dir(module)
    assert all(getattr(module, name) is not None for name in module.__all__)
    page = (root / "docs/reference/api.md").read_text("utf-8")
    part = page.partition(f"\n## {door}\n")[2].partition("\n## ")[0]
    assert re.findall(r"^### (.+)$", part, re.MULTILINE) == module.__all__


def test_every_public_name_is_documented() -> None:
    assert not [*undocumented()]


def test_a_name_that_is_not_there_is_an_error() -> None:
    for door in DOORS:
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = importlib.import_module(door).no_such_name


def test_docstrings_become_markdown() -> None:
    assert prose("A ``b``.\n\nSince 0.1. Example::\n\n    c()") == "A `b`.\n\nSince 0.1."
    assert prose("``a\nb`` < c") == "`a\nb` &lt; c"
    assert "```python\nclass A: ...\n```" in prose("Write::\n\n    class A: ...\n\nAnd so on.")
