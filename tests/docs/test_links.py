"""Links between pages lead to files and headings that are there, and every page is in the menu."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from conftest import Page

_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def test_links_lead_somewhere(page: Page) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.text, flags=re.MULTILINE | re.DOTALL)
    links = _LINK.findall(prose)
    assert len(links) == len(re.findall(r"\]\((?!https?:|mailto:)", prose))
    for file, anchor in links:
        target = (page.path.parent / file).resolve() if file else page.path
        assert target.exists(), f"{page.path.name}: {file}"
        if anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), f"{file}#{anchor}"


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_can_be_reached(root: Path) -> None:
    text = re.sub(r"!!python/\S+", "", (root / "mkdocs.yml").read_text())
    named = set(re.findall(r"([\w/.-]+\.md)", str(yaml.safe_load(text)["nav"])))
    there = {path.relative_to(root / "docs").as_posix() for path in (root / "docs").rglob("*.md")}
    assert named == there
