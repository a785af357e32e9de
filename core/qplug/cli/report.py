"""``qplug report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qplug.cli.printing import Command, note, say
from qplug.cli.progress import progress_bar
from qplug.cli.text_options import TextOptions, text_options
from qplug.errors import QplugError
from qplug.output.measured import Measured
from qplug.registry.registry import Registry
from qplug.report.page_file import check_target, default_file, write

if TYPE_CHECKING:
    from qplug.api.events import Result
    from qplug.reading.folder import Folder
    from qplug.reading.perplexity import Evaluation


@click.command(name="report", cls=Command)
@click.argument("folder")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The HTML file to write; default: FOLDER.report.html.",
)
@click.option(
    "--against",
    metavar="MODEL",
    help="The float model to compare with; default: the one that FOLDER names, if it is at hand.",
)
@click.option(
    "--perplexity", is_flag=True, help="Measure the perplexities of FOLDER and the float model."
)
@click.option(
    "--check",
    is_flag=True,
    help="Measure perplexity and divergence against the float model, with a verdict.",
)
@text_options
@click.pass_obj
def command(
    registry: Registry,
    folder: str,
    out: Path | None,
    against: str | None,
    perplexity: bool,
    check: bool,
    dataset: str,
    dataset_options: tuple[str, ...],
    seq_len: int,
    windows: int,
    device: str,
    trust_remote_code: bool,
) -> None:
    """Write an HTML report on the quantized FOLDER: sizes, errors, ranges, how to serve it.

    The report is a single file that loads nothing else. Only the report of qplug quantize --report
    contains the time and the memory of the run.
    """
    from qplug.checkpoint.locate import find_model
    from qplug.machine.session import Session
    from qplug.reading.folder import open_folder
    from qplug.reading.verify import find_source

    file = out or default_file(find_model(folder))
    check_target(file)
    measured, quality = {}, None
    if perplexity or check:
        text = TextOptions(dataset, dataset_options, seq_len, windows, device, trust_remote_code)
        session = Session(registry, trust_remote_code=trust_remote_code)
        opened = open_folder(folder, session)
        _, source = find_source(opened, against, session)
        if check:
            if source is None:
                raise QplugError(f"{folder}: --check: {_missing(opened)}")
            quality = Measured.of(text.check(folder, str(source.folder), registry))
        if perplexity and source is not None:
            measured["float"] = [text.measure(str(source.folder), registry)]
        if perplexity:
            measured["quantized"] = [text.measure(folder, registry)]
    write_report(
        folder,
        file,
        registry,
        against=against,
        trust_remote_code=trust_remote_code,
        measured=measured,
        quality=quality,
    )
    say(f"{folder}: report in {file}")


def _missing(opened: Folder) -> str:
    """Returns which float model is not at hand, and what to do."""
    from qplug.reading.verify import not_at_hand

    if opened.manifest is None:
        return "name the float model with --against"
    return not_at_hand(opened.manifest.model)


def write_report(
    folder: str,
    file: Path,
    registry: Registry,
    *,
    against: str | None = None,
    trust_remote_code: bool = False,
    measured: Mapping[str, Sequence[Evaluation]] | None = None,
    quality: Measured | None = None,
    result: Result | None = None,
) -> None:
    """Reads ``folder`` and writes the report on it to ``file``.

    ``measured`` are perplexities by model, ``float`` or ``quantized``, and ``quality`` is on top of
    the page. ``result`` is the result of the run that wrote the folder, for the costs of its stages
    and for the quality, if it was measured. Raises QplugError if the folder
    cannot be read, or the file cannot be written.
    """
    from qplug.reading.verify import not_at_hand
    from qplug.report.examine import examine
    from qplug.report.page import report_page

    with progress_bar("reporting") as bar:
        findings = examine(
            folder,
            registry,
            against=against,
            trust_remote_code=trust_remote_code,
            watch=lambda done, total: bar(done, total, "", None),
        )
    if findings.against is None and findings.overview.model is not None:
        note(f"not compared: {not_at_hand(findings.overview.model)}")
    if quality is None and result is not None and result.quality is not None:
        quality = Measured.of(result.quality)
    page = report_page(
        findings,
        measured=measured,
        quality=quality,
        stages=result.stages if result else (),
        seconds=result.seconds if result else None,
    )
    write(file, page)
