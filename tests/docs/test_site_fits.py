"""Pages of the site fit a desk and a phone, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import IN_BROWSER

if TYPE_CHECKING:
    from browser import Browser

pytestmark = [*IN_BROWSER, pytest.mark.slow]

#: Names what is cut off: the page itself, tables, and boxes that hold one that is too wide.
CUT_OFF = """(() => {
  const wrong = [];
  if (document.documentElement.scrollWidth > innerWidth) wrong.push('the page');
  document.querySelectorAll('article table').forEach((table, number) => {
    const holder = table.closest('.md-typeset__scrollwrap') || table.parentElement;
    const over = holder.scrollWidth > holder.clientWidth + 1;
    if (over || table.getBoundingClientRect().right > innerWidth)
      wrong.push('table ' + number + ': ' + table.rows[0].innerText);
  });
  return wrong;
})()"""


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(root / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.mark.filterwarnings("default")  # mkdocs' own dependencies warn
@pytest.mark.parametrize("width", [1280, 400])
def test_tables_and_pages_fit(width: int, site: Path, browser: Browser) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    cut_off = {}
    for page in pages:
        browser.open(page, width=width)
        if wrong := browser.ask(CUT_OFF):
            cut_off[str(page.relative_to(site))] = wrong
    assert cut_off == {}


@pytest.mark.filterwarnings("default")
def test_a_card_names_its_columns(site: Path, browser: Browser) -> None:
    """On a phone, a cell of the table of engines says which column it is in."""
    browser.open(site / "engines.html", width=400)
    cell = "document.querySelector('article table tbody tr').cells[1]"
    assert browser.ask(f"getComputedStyle({cell}, '::before').content") == '"sm80"'
    assert browser.ask(f"{cell}.getAttribute('role')") == "cell"
    browser.open(site / "engines.html", width=1280)
    assert browser.ask(f"getComputedStyle({cell}, '::before').content") == "none"
