"""Chooses and writes the file of a page, and refuses to overwrite any other kind of file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from html.parser import HTMLParser
from pathlib import Path

from qplug.errors import QplugError
from qplug.files.json_text import parse_json
from qplug.files.regular import open_regular
from qplug.output.measured import Measured

#: The line of ``frame.html.jinja``, near the start of a file, by which a page is recognised.
_MARK = '<meta name="generator" content="qplug">'


def default_file(folder: Path) -> Path:
    """Returns the default file of the report on ``folder``: ``FOLDER.report.html``."""
    absolute = folder.absolute()
    return absolute.with_name(f"{absolute.name}.report.html")


def report_file(report: str, out: Path) -> Path:
    """Returns the file that ``--report [FILE]`` names; without FILE, ``report`` is ""."""
    return Path(report) if report else default_file(out)


def refuse_pages(report: str, outs: Sequence[Path]) -> None:
    """Raises QplugError if the report on any folder in ``outs`` cannot be written."""
    if report and len(outs) > 1:
        raise QplugError(
            f"--report {report}: {len(outs)} folders need a page each; pass --report without a file"
        )
    for out in outs:
        check_target(report_file(report, out), makes=out.absolute().parents)


def check_target(file: Path, makes: Collection[Path] = ()) -> None:
    """Raises QplugError if ``file`` cannot be written, or exists and is not a page of qplug.

    ``makes``: folders that are made before the page is written.
    """
    if file.suffix not in (".html", ".htm"):
        raise QplugError(f"{file}: a report is a page; give it a name that ends in .html")
    if file.absolute().parent not in makes and not file.absolute().parent.is_dir():
        raise QplugError(f"{file.absolute().parent}: no such folder to write into")
    try:
        if file.exists() and _MARK not in _beginning(file):
            raise QplugError(
                f"{file}: was not written by qplug, so it is not overwritten; choose another file"
            )
    except OSError as error:
        raise QplugError(f"{file}: cannot be written: {error.strerror}") from error


def write(file: Path, page: str) -> None:
    """Writes ``page``, an HTML text, to ``file``. Raises QplugError as ``check_target`` does."""
    check_target(file)
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise QplugError(f"{file}: cannot be written: {error.strerror}") from error


def _beginning(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.read(1000).decode(errors="replace")


# --- the quality in a page -----------------------------------------------------------------------

_QUALITY = "qplug-quality"
#: Bytes at the start of a page that hold all its elements ``meta``.
_HEAD = 16_384


def quality_mark(quality: Measured, identity: str) -> tuple[str, str]:
    """Returns the name and the content of the element ``meta`` that holds ``quality`` in a page.

    ``identity`` is the one of the folder that was measured.
    """
    return _QUALITY, json.dumps({"identity": identity, **dataclasses.asdict(quality)})


def read_quality(file: Path, identity: str) -> Measured | None:
    """Returns the quality in the page ``file``; None if nothing was measured for the page.

    Raises QplugError if ``file`` is not a page of qplug, or not on the folder with ``identity``.
    """
    with open_regular(file) as opened:
        page = opened.read(_HEAD).decode("utf-8", errors="replace")
    if _MARK not in page[:1000]:
        raise QplugError(f"{file}: is not a report of qplug")
    found = _Marks()
    found.feed(page.partition("<style>")[0])
    if found.content is None:
        return None
    try:
        told = parse_json(found.content, str(file))
        measured_folder, quality = told.pop("identity"), Measured(**told)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise QplugError(f"{file}: is damaged; write it with qplug report") from error
    if measured_folder != identity:
        raise QplugError(f"{file}: is on another folder; write it again with qplug report")
    return quality


class _Marks(HTMLParser):
    """Finds the content of the element ``meta`` with the quality."""

    content: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag == "meta" and told.get("name") == _QUALITY:
            self.content = told.get("content")
