"""The document around a page's sections: nothing in it is fetched, and no script would run."""

from __future__ import annotations

from pathlib import Path

from qplug import __version__
from qplug.errors import QplugError
from qplug.report.markup import Child, Markup, tag

_GENERATOR = "qplug"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d2126; --faint: #5b6570;
  --rule: #dcdfe3; --c0: #1f6feb; --c1: #c4500c; --c2: #1a7f4b; --c3: #8250df; --c4: #b3261e;
  --c5: #0b7285; --c6: #7a5c00; --c7: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e6e8ea;
  --faint: #a3adb8; --rule: #353b42; --c0: #6cb0ff; --c1: #ff9a5c; --c2: #5fd39a; --c3: #c7a6ff;
  --c4: #ff8a80; --c5: #5fd0e0; --c6: #e3c15a; --c7: #aab2bd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
p.faint, footer { color: var(--faint); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 1rem 1.1rem; margin: 1rem 0; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem;
  margin: 1rem 0; }
dl.tiles > div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: .7rem .9rem; }
dl.tiles dt { color: var(--faint); font-size: .85rem; }
dl.tiles dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding: .2rem 0; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
td { white-space: nowrap; }
th[scope=row], thead th:first-child { text-align: left; padding-left: 0; }
th[scope=row] { font-weight: 500; }
table.words td { text-align: left; overflow-wrap: anywhere; white-space: normal; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--faint); }
pre { overflow-x: auto; background: var(--page); border: 1px solid var(--rule);
  border-radius: 6px; padding: .7rem; margin: .5rem 0; font-size: .9rem; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0;
  margin: .4rem 0; font-size: .85rem; }
ul.legend svg { vertical-align: -3px; margin-right: .3rem; }
svg.chart { display: block; width: 100%; min-width: 36rem; height: auto; }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .mark { stroke: var(--ink); stroke-width: 2; }
svg .line { fill: none; stroke-width: 1.6; opacity: .75; }
""" + "\n".join(
    f"svg .bar.c{n} {{ fill: var(--c{n}); }} svg .line.c{n} {{ stroke: var(--c{n}); }}"
    for n in range(8)
)


def document(title: str, *body: Child) -> str:
    """A whole HTML file. ``title`` is text, and so may be anything."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=_GENERATOR),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    footer = tag("footer", tag("p", f"Made by qplug {__version__}."))
    page = tag("html", head, tag("body", tag("main", *body), footer), lang="en")
    return f"<!doctype html>\n{page}\n"


def check_target(file: Path) -> None:
    """Raises QplugError if ``file`` cannot be written, or is something else than such a page."""
    if file.suffix not in (".html", ".htm"):
        raise QplugError(f"{file}: a report is a page; give it a name that ends in .html")
    if not file.absolute().parent.is_dir():
        raise QplugError(f"{file.absolute().parent}: no such folder to write into")
    try:
        if file.exists() and f'name="generator" content="{_GENERATOR}"' not in _beginning(file):
            raise QplugError(f"{file}: is no page of qplug's, so it is not overwritten")
    except OSError as error:
        raise QplugError(f"{file}: cannot be written: {error.strerror}") from error


def write(file: Path, page: str) -> None:
    """Write a page to ``file``. Raises QplugError as ``check_target``."""
    check_target(file)
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise QplugError(f"{file}: cannot be written: {error.strerror}") from error


def _beginning(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.read(1000).decode(errors="replace")
