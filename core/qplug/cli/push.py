"""``qplug push``."""

from __future__ import annotations

from pathlib import Path

import click

from qplug.cli.printing import Command, note, say
from qplug.errors import QplugError
from qplug.registry.registry import Registry
from qplug.report.page_file import default_file, read_quality


@click.command(name="push", cls=Command)
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("repository", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository that only you see.")
@click.option(
    "--token",
    help="A token that may write; by default HF_TOKEN, or the one of hf auth login.",
)
@click.option("--commit-message", metavar="TEXT", help="The title of the commit.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="The report with the quality for the model card; default: OUT.report.html, if it exists.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's folder.")
@click.pass_obj
def command(
    registry: Registry,
    folder: Path,
    repository: str,
    private: bool,
    token: str | None,
    commit_message: str | None,
    report: Path | None,
    trust_remote_code: bool,
) -> None:
    """Upload the quantized folder OUT to USER/NAME on the Hub.

    qplug checks the folder by its headers first; qplug verify checks every weight. A report that
    measured the quality adds it to the model card, in OUT too. Hidden files stay on this machine.
    """
    from qplug.output.publish import publish
    from qplug.reading.verify import quick_problems

    if not folder.is_dir():
        raise QplugError(f"{folder}: no such folder")
    if repository.count("/") != 1:
        raise QplugError(f"{repository}: a repository on the Hub has a name like user/model")
    problems = quick_problems(str(folder), registry, trust_remote_code=trust_remote_code)
    if problems:
        first = problems[0]
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise QplugError(f"{folder}: not uploaded: {first}{more}; see qplug verify")
    _add_quality(folder, report)
    address = publish(
        folder,
        repository,
        private=private,
        token=token,
        message=commit_message or f"Upload {repository.partition('/')[2]}, quantized by qplug",
    )
    say(address)


def _add_quality(folder: Path, report: Path | None) -> None:
    """Adds the quality of a report to the card of ``folder``, if there is such a report."""
    from qplug.output.card_quality import add_quality
    from qplug.output.manifest import read_manifest

    page = report or default_file(folder)
    if report is None and not page.is_file():
        note("the model card says nothing of quality: qplug report OUT --check measures it")
        return
    manifest = read_manifest(folder)
    try:
        measured = read_quality(page, manifest.identity if manifest else "")
    except FileNotFoundError as error:
        raise QplugError(f"{page}: no such file") from error
    if measured is not None and add_quality(folder, measured):
        note(f"{folder / 'README.md'}: has the quality of {page}")
