"""Pages in a real browser: nothing sticks out or overlaps, and tables and charts answer."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import IN_BROWSER
from PIL import Image

from qplug.api.events import StageCost
from qplug.output.measured import Measured
from qplug.reading.perplexity import Evaluation
from qplug.registry.registry import Registry
from qplug.report.comparison import Compared, comparison_page
from qplug.report.examine import examine
from qplug.report.page import report_page

if TYPE_CHECKING:
    from browser import Browser

    from qplug.report.findings import Findings

pytestmark = IN_BROWSER

#: Says how the page lies on the screen.
PROBE = """(() => {
const box = e => e.getBoundingClientRect(), wrong = [];
for (const d of document.querySelectorAll('details')) d.open = true;
for (const svg of document.querySelectorAll('svg.chart')) {
  const frame = box(svg), seen = [];
  if (frame.right > innerWidth + 1) wrong.push('cut off: ' + svg.getAttribute('aria-label'));
  for (const text of svg.querySelectorAll('text')) {
    const b = box(text), told = text.lastChild.data;
    if (b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1)
      wrong.push('outside: ' + told);
    if (b.height < 9) wrong.push('small: ' + told);
    for (const [other, name] of seen)
      if (b.left < other.right - 1 && other.left < b.right - 1 &&
          b.top < other.bottom - 3 && other.top < b.bottom - 3)
        wrong.push('overlap: ' + told + ' / ' + name);
    seen.push([b, told]);
  }
  for (const bar of svg.querySelectorAll('.bar, .line'))
    if (box(bar).right > frame.right + 1 || box(bar).left < frame.left - 1)
      wrong.push('bar outside: ' + svg.getAttribute('aria-label'));
}
for (const e of document.querySelectorAll('body *')) {
  if (box(e).right <= innerWidth + 1 || e.closest('.scroll')) continue;
  wrong.push('too wide: ' + e.tagName);
}
return {wrong, width: document.documentElement.scrollWidth, window: innerWidth,
  charts: document.querySelectorAll('svg.chart').length,
  page: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color};
})()"""


@pytest.fixture(scope="module")
def findings(awq: Path) -> Findings:
    return examine(str(awq), Registry.installed())


@pytest.fixture(scope="module")
def pages(findings: Findings, awq: Path, rtn: Path, tmp_path_factory: Any) -> dict[str, Path]:
    """A report, a report on 80 blocks, and a comparison, each in a file."""
    stages = tuple(
        StageCost(name, seconds, 3_000_000_000, None)
        for name, seconds in (("reading", 0.5), ("statistics", 12.25), ("passing on", 7.0))
    )
    quality = Measured("4 windows of 32 tokens of demo", 5.5, 5.4, 0.01, "good", "It is close.")
    evaluations = (Evaluation("m", 5.5, "demo", 4, 32), Evaluation("m", 5.6, "demo", 4, 32))
    compared = [
        Compared(examine(str(folder), Registry.installed()).overview, found)
        for folder, found in zip((awq, rtn), evaluations, strict=True)
    ]
    folder = tmp_path_factory.mktemp("pages")
    texts = {
        "report": report_page(findings, quality=quality, stages=stages, seconds=21.0),
        "deep": report_page(deep(findings)),
        "comparison": comparison_page(compared),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


def deep(findings: Findings) -> Findings:
    """The findings on a model of 80 blocks, which vary around the first one of ``findings``."""
    drawn = random.Random(0)
    layers = tuple(
        replace(
            layer,
            name=layer.name.replace(".0.", f".{block}."),
            block=block,
            loss=(layer.loss or 0.0) * drawn.uniform(0.5, 1.5 + block / 40),
        )
        for block in range(80)
        for layer in findings.layers
        if layer.block == 0
    )
    return replace(findings, layers=layers)


@pytest.mark.parametrize(
    ("width", "dark"), [pytest.param(1100, False, marks=pytest.mark.slow), (400, True)]
)
@pytest.mark.parametrize(
    "name", ["report", *(pytest.param(n, marks=pytest.mark.slow) for n in ("deep", "comparison"))]
)
def test_layout(
    name: str, width: int, dark: bool, pages: dict[str, Path], browser: Browser
) -> None:
    browser.open(pages[name], width=width, dark=dark)
    said = browser.ask(PROBE)
    assert said["wrong"] == []
    assert (said["window"], said["width"]) == (width, width)
    assert said["charts"] == {"report": 20, "deep": 19, "comparison": 8}[name]
    assert browser.requests == [pages[name].as_uri()]
    dim, bright = ("page", "ink") if dark else ("ink", "page")
    assert luminance(said[bright]) > 0.75
    assert luminance(said[dim]) < 0.02


def luminance(colour: str) -> float:
    """The luminance of ``rgb(r, g, b)``, as WCAG 2 defines it."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


# --- tables --------------------------------------------------------------------------------------

#: The numbers of a column of the table of all layers, from above.
COLUMN = "[...document.querySelectorAll('.tall tbody tr')].map(r => r.cells[{}].textContent)"
HEAD = "document.querySelectorAll('.tall thead th')[{}]"


def test_a_table_is_sorted_by_click_and_by_key(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["report"])
    wanted = [float(text) for text in browser.ask(COLUMN.format(3))]
    head = HEAD.format(3)
    browser.ask(f"{head}.scrollIntoView({{block: 'center'}})")
    place = browser.ask(f"(b => [b.left + b.width / 2, b.top + b.height / 2])"
                        f"({head}.firstChild.getBoundingClientRect())")  # fmt: skip
    browser.click(*place)
    assert browser.ask(f"{head}.getAttribute('aria-sort')") == "descending"
    assert numbers(browser, 3) == sorted(wanted, reverse=True)
    browser.ask(f"{head}.firstChild.focus()")
    browser.press("Enter")
    assert browser.ask(f"{head}.getAttribute('aria-sort')") == "ascending"
    assert numbers(browser, 3) == sorted(wanted)
    browser.ask(f"{HEAD.format(0)}.firstChild.focus()")
    browser.press(" ")
    names = browser.ask(COLUMN.format(0))
    assert names == sorted(names)
    assert browser.ask(f"{head}.hasAttribute('aria-sort')") is False
    outline = browser.ask("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus shows


def numbers(browser: Browser, column: int) -> list[float]:
    return [float(text) for text in browser.ask(COLUMN.format(column))]


def test_layers_are_filtered(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["deep"])
    shown = "[...document.querySelectorAll('.tall tbody tr')].filter(r => r.offsetHeight).length"
    assert browser.ask(shown) == 560
    browser.ask(
        "(f => { f.value = '.79.'; f.dispatchEvent(new Event('input')); })"
        "(document.querySelector('.filter input'))"
    )
    assert browser.ask(shown) == 7


# --- values --------------------------------------------------------------------------------------

TIP = "(t => t.hidden ? null : t.textContent)(document.querySelector('.tip'))"


def test_a_chart_tells_its_values_to_the_pointer_and_the_keys(
    pages: dict[str, Path], browser: Browser
) -> None:
    browser.open(pages["deep"], width=400)
    assert browser.ask(TIP) is None
    hits = "document.querySelector('.panels svg.chart').querySelectorAll('.hit')"
    browser.ask(f"{hits}[40].scrollIntoView({{block: 'center'}})")
    place = browser.ask(
        f"(b => [b.left + b.width / 2, b.top + b.height / 2])({hits}[40].getBoundingClientRect())"
    )
    browser.point(*place)
    assert re.fullmatch(r"mlp.down_proj, block 40: 0\.\d+", browser.ask(TIP))
    assert browser.ask("document.querySelector('.tip').getBoundingClientRect().right") <= 400
    browser.ask("document.querySelector('.panels svg.chart').focus()")
    for key, block in (("ArrowRight", 0), ("ArrowRight", 1), ("End", 79), ("ArrowLeft", 78)):
        browser.press(key)
        assert browser.ask(TIP).startswith(f"mlp.down_proj, block {block}: ")
    browser.press("Escape")
    assert browser.ask(TIP) is None


def test_without_a_script_the_page_has_the_same_content(
    pages: dict[str, Path], browser: Browser
) -> None:
    text = "document.querySelector('main').textContent"
    browser.open(pages["report"])
    scripted = browser.ask(text.replace("textContent", "innerText"))
    browser.open(pages["report"], scripts=False)
    plain = browser.ask(text.replace("textContent", "innerText"))
    assert {*scripted.split()} - {"Show", "layers", "with"} <= {*plain.split()}
    assert browser.ask("document.querySelectorAll('svg.chart title').length") > 50
    assert browser.ask("document.querySelectorAll('th button').length") == 0


def test_screen_readers_get_names_and_texts(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["report"])
    for selector, name in (
        ("svg.chart", "e.getAttribute('role') === 'img' && e.getAttribute('aria-label')"),
        ("table", "e.caption.textContent.trim()"),
        (".scroll", "e.getAttribute('role') === 'region' && e.getAttribute('aria-label')"),
        ("th", "e.scope"),
        ("input", "e.closest('label').textContent"),
    ):
        named = f"[...document.querySelectorAll('{selector}')].map(e => Boolean({name}))"
        assert browser.ask(named)
        assert all(browser.ask(named)), selector
    headings = browser.ask("[...document.querySelectorAll('h1,h2,h3')].map(e => e.tagName)")
    assert headings.count("H1") == 1
    assert browser.ask("document.documentElement.lang") == "en"
    assert browser.ask("document.querySelector('.tip').getAttribute('role')") == "status"


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        (1000, False),
        pytest.param(1000, True, marks=pytest.mark.slow),
        pytest.param(400, False, marks=pytest.mark.slow),
        pytest.param(400, True, marks=pytest.mark.slow),
    ],
)
def test_screenshot(
    width: int, dark: bool, pages: dict[str, Path], browser: Browser, tmp_path: Path
) -> None:
    """The page is drawn, with its charts in their colours."""
    browser.open(pages["report"], width=width, dark=dark)
    browser.screenshot(tmp_path / "page.png")
    colours = colours_of(tmp_path / "page.png")
    page, card, first, second, good = (
        ("20,23,26", "28,32,36", "108,176,255", "255,154,92", "95,211,154")
        if dark
        else ("251,251,250", "255,255,255", "31,111,235", "196,80,12", "26,127,75")
    )
    assert colours.get(page, 0) > 100_000
    assert colours.get(card, 0) > 500_000
    assert colours.get(first, 0) > 2_000
    assert colours.get(second, 0) > 2_000
    assert colours.get(good, 0) > 200  # the verdict


def colours_of(picture: Path) -> dict[str, int]:
    """How many pixels have each colour, by ``r,g,b``."""
    with Image.open(picture) as image:
        found = image.convert("RGB").getcolors(maxcolors=1 << 24)
    return {",".join(map(str, colour)): count for count, colour in found or ()}
