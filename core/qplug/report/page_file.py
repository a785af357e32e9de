"""Files of pages: where they are written, and what they never overwrite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qplug.errors import QplugError

#: The line of ``frame.html.jinja`` by which a page is known again, among the first of a file.
_MARK = '<meta name="generator" content="qplug">'


def beside(folder: Path) -> Path:
    """The file of the report on ``folder`` unless the user names another."""
    absolute = folder.absolute()
    return absolute.with_name(f"{absolute.name}.report.html")


def report_file(report: str, out: Path) -> Path:
    """The file that ``--report [FILE]`` asks for; "" is no FILE."""
    return Path(report) if report else beside(out)


def refuse_pages(report: str, outs: Sequence[Path]) -> None:
    """Raises QplugError if ``report_file`` of one of ``outs`` cannot be written."""
    if report and len(outs) > 1:
        raise QplugError(f"--report {report}: {len(outs)} folders need a page each; name no file")
    for out in outs:
        check_target(report_file(report, out))


def check_target(file: Path) -> None:
    """Raises QplugError if ``file`` cannot be written, or is something else than such a page."""
    if file.suffix not in (".html", ".htm"):
        raise QplugError(f"{file}: a report is a page; give it a name that ends in .html")
    if not file.absolute().parent.is_dir():
        raise QplugError(f"{file.absolute().parent}: no such folder to write into")
    try:
        if file.exists() and _MARK not in _beginning(file):
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
