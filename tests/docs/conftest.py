"""The pages of the documentation, and the blocks of code on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_BLOCK = re.compile(
    r'^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n'
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """Fenced code. ``title`` names the file it stands for, ``reason`` says why it is not run."""

    language: str
    code: str
    title: str | None
    reason: str | None


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[Block]:
        found = [Block(**match.groupdict()) for match in _BLOCK.finditer(self.text)]
        # Whatever looks like a fence is one of those that were found.
        assert len(re.findall(r"^\s*(?:```|~~~)", self.text, re.MULTILINE)) == 2 * len(found)
        return found

    def write_files(self, folder: Path) -> None:
        for block in self.blocks:
            if block.title:
                (folder / block.title).write_text(block.code, encoding="utf-8")


def pages() -> list[Page]:
    written = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [Page(path) for path in [*written, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]]


def pages_by_name() -> dict[str, Page]:
    return {str(page.path.relative_to(ROOT)): page for page in pages()}


#: Pages whose commands take long: several runs, on samples of the size that users calibrate with.
SLOW = (
    "README.md",
    "docs/tutorial.md",
    "docs/how-to/evaluate.md",
    "docs/how-to/accuracy-dropped.md",
    "docs/how-to/out-of-memory.md",
    "docs/how-to/experts.md",
    "docs/how-to/idea-to-paper.md",
    "docs/how-to/read-the-report.md",
    "docs/how-to/publish-on-the-hub.md",
    "docs/how-to/mixed-precision.md",
    "docs/how-to/own-data.md",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    named = pages_by_name()
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", named.values(), ids=list(named))
    if "typed_page" in metafunc.fixturenames:  # its commands are run
        marks = {name: pytest.mark.slow if name in SLOW else () for name in named}
        typed = [pytest.param(page, id=name, marks=marks[name]) for name, page in named.items()]
        metafunc.parametrize("typed_page", typed)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def named_pages() -> dict[str, Page]:
    """Every page, by its path below the root."""
    return pages_by_name()
