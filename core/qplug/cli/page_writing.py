"""Pages that commands write beside folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qplug.cli.progress import progress_bar
from qplug.errors import QplugError
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from qplug.api.events import Result
    from qplug.reading.perplexity import Evaluation


def beside(folder: Path) -> Path:
    """Where the report on ``folder`` goes unless the user names a file."""
    absolute = folder.absolute()
    return absolute.with_name(f"{absolute.name}.report.html")


def refuse_pages(report: str, outs: Sequence[Path]) -> None:
    """Raises QplugError if ``report_file`` of one of ``outs`` cannot be written."""
    from qplug.report.frame import check_target

    if report and len(outs) > 1:
        raise QplugError(f"--report {report}: {len(outs)} folders need a page each; name no file")
    for out in outs:
        check_target(report_file(report, out))


def report_file(report: str, out: Path) -> Path:
    """The file that ``--report [FILE]`` asks for; "" is no FILE."""
    return Path(report) if report else beside(out)


def write_report(
    folder: str,
    file: Path,
    registry: Registry,
    *,
    against: str | None = None,
    trust_remote_code: bool = False,
    measured: Mapping[str, Sequence[Evaluation]] | None = None,
    result: Result | None = None,
) -> None:
    """Read ``folder`` and write the page on it to ``file``.

    ``result`` is of the run that wrote the folder, for what it cost. Raises QplugError if one
    cannot be read or the other not be written.
    """
    from qplug.report.examine import examine
    from qplug.report.frame import write
    from qplug.report.page import report_page

    with progress_bar("reporting") as bar:
        findings = examine(
            folder,
            registry,
            against=against,
            trust_remote_code=trust_remote_code,
            watch=lambda done, total: bar(done, total, "", None),
        )
    page = report_page(
        findings,
        measured=measured,
        stages=result.stages if result else (),
        seconds=result.seconds if result else None,
    )
    write(file, page)
