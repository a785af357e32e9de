"""Pages in a real browser: nothing sticks out or overlaps, in light and dark, wide and narrow."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qplug.api.events import StageCost
from qplug.reading.perplexity import Evaluation
from qplug.registry.registry import Registry
from qplug.report.comparison import Compared, comparison_page
from qplug.report.examine import examine
from qplug.report.page import report_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]

#: Says how the page lies on the screen. The page's own policy would not let it run.
PROBE = """<script>
const box = e => e.getBoundingClientRect(), wrong = [];
for (const d of document.querySelectorAll('details')) d.open = true;
for (const svg of document.querySelectorAll('svg.chart')) {
  const frame = box(svg), seen = [];
  for (const text of svg.querySelectorAll('text')) {
    const b = box(text), told = text.lastChild.data;
    if (b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1)
      wrong.push('outside: ' + told);
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
for (const e of document.querySelectorAll('section, h1, h2, dl, p, pre'))
  if (box(e).right > innerWidth + 1) wrong.push('too wide: ' + e.tagName);
const said = {wrong, width: document.documentElement.scrollWidth, window: innerWidth,
  charts: document.querySelectorAll('svg.chart').length,
  fetched: performance.getEntriesByType('resource').map(e => e.name),
  page: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color};
document.body.innerHTML = '<pre id=said></pre>';
document.getElementById('said').textContent = JSON.stringify(said);
</script>"""

#: Counts the colours of the picture before it.
COUNTER = """<script>onload = () => {
  const picture = document.images[0], canvas = document.createElement('canvas'), counts = {};
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext('2d');
  context.drawImage(picture, 0, 0);
  const bytes = context.getImageData(0, 0, canvas.width, canvas.height).data;
  for (let n = 0; n < bytes.length; n += 4) {
    const colour = bytes[n] + ',' + bytes[n + 1] + ',' + bytes[n + 2];
    counts[colour] = (counts[colour] || 0) + 1;
  }
  document.body.innerHTML = '<pre>' + JSON.stringify(counts) + '</pre>';
}</script>"""


def browse(folder: Path, page: str, *, width: int, dark: bool) -> dict[str, Any]:
    """What a browser says of a page."""
    file = folder / "probed.html"
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    file.write_text(probed.replace("</body>", PROBE + "</body>"))
    told = run(folder, "--dump-dom", f"--window-size={width},900", file, dark=dark)
    found = re.search(r'<pre id="said">(.*?)</pre>', told, re.DOTALL)
    assert found is not None, told[-2000:]
    said: dict[str, Any] = json.loads(found[1].replace("&lt;", "<").replace("&amp;", "&"))
    return said


def run(folder: Path, *words: object, dark: bool) -> str:
    file = Path(str(words[-1]))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--force-dark-mode"][: 2 if dark else 1]
    command = [str(CHROMIUM), *flags, *map(str, words[:-1]), file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module")
def report(awq: Path) -> str:
    stages = tuple(
        StageCost(name, seconds, 3_000_000_000, None)
        for name, seconds in (("reading", 0.5), ("statistics", 12.25), ("passing on", 7.0))
    )
    measured = {"quantized": [Evaluation("m", 5.5, "demo", 4, 32)]}
    findings = examine(str(awq), Registry.installed())
    return report_page(findings, measured=measured, stages=stages, seconds=21.0)


@pytest.fixture(scope="module")
def comparison(awq: Path, rtn: Path) -> str:
    compared = [
        Compared(examine(str(folder), Registry.installed()).overview, found)
        for folder in (awq, rtn)
        for found in (Evaluation("m", 5.5, "demo", 4, 32), Evaluation("m", 5.6, "demo", 4, 32))
    ]
    return comparison_page(compared)


@pytest.mark.parametrize(
    ("width", "dark"), [pytest.param(1100, False, marks=pytest.mark.slow), (500, True)]
)
def test_layout(width: int, dark: bool, report: str, comparison: str, tmp_path: Path) -> None:
    for page, charts in ((report, 8), (comparison, 1)):
        said = browse(tmp_path, page, width=width, dark=dark)
        assert said["wrong"] == []
        assert said["width"] <= said["window"]
        assert said["charts"] == charts
        assert said["fetched"] == []
        dim, bright = ("page", "ink") if dark else ("ink", "page")
        assert luminance(said[bright]) > 0.75
        assert luminance(said[dim]) < 0.02


def luminance(colour: str) -> float:
    """That of WCAG 2, of ``rgb(r, g, b)``."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_screenshot(dark: bool, report: str, tmp_path: Path) -> None:
    """As it is, policy and all: the page is drawn, with its charts in their colours."""
    (tmp_path / "page.html").write_text(report)
    picture = tmp_path / "page.png"
    words = (f"--screenshot={picture}", "--window-size=1000,3000", tmp_path / "page.html")
    run(tmp_path, *words, dark=dark)
    colours = colours_of(picture)
    page, first, second = (
        ("20,23,26", "108,176,255", "255,154,92")
        if dark
        else ("251,251,250", "31,111,235", "196,80,12")
    )
    assert colours.get(page, 0) > 100_000
    assert colours.get(first, 0) > 2_000
    assert colours.get(second, 0) > 2_000


def colours_of(picture: Path) -> dict[str, int]:
    """How many pixels have each colour, by ``r,g,b``: the browser can read what it has drawn."""
    encoded = base64.b64encode(picture.read_bytes()).decode()
    counter = picture.with_suffix(".counter.html")
    counter.write_text(f'<img src="data:image/png;base64,{encoded}">{COUNTER}')
    told = run(picture.parent, "--dump-dom", counter, dark=False)
    found = re.search(r"<pre>(.*?)</pre>", told, re.DOTALL)
    assert found is not None, told[-500:]
    counts: dict[str, int] = json.loads(found[1])
    return counts
