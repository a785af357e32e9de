"""``qplug compare``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qplug.cli.printed_table import print_table
from qplug.cli.text_options import TextOptions, text_options
from qplug.registry.registry import Registry


@click.command(name="compare")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="qplug-compare.html",
    show_default=True,
    help="The page to write.",
)
@click.option("--perplexity", is_flag=True, help="Measure it, and plot it against the size.")
@text_options
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
@click.pass_obj
def command(
    registry: Registry,
    folders: tuple[str, ...],
    out: Path,
    perplexity: bool,
    dataset: str,
    dataset_options: tuple[str, ...],
    seq_len: int,
    windows: int,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Put several models side by side, float or quantized: sizes, errors, perplexities.

    The table is printed, and written as a page with a plot.
    """
    from qplug.machine.session import Session
    from qplug.reading.folder import open_folder
    from qplug.report.comparison import COLUMNS, Compared, comparison_page
    from qplug.report.examine import overview
    from qplug.report.page_file import check_target, write

    check_target(out)
    session = Session(registry, trust_remote_code=trust_remote_code)
    opened = [open_folder(folder, session) for folder in folders]
    overviews = [overview(one, name) for one, name in zip(opened, folders, strict=True)]
    text = TextOptions(dataset, dataset_options, seq_len, windows, device, trust_remote_code)
    compared = [
        Compared(told, text.measure(told.folder, registry) if perplexity else None)
        for told in overviews
    ]
    write(out, comparison_page(compared))
    if as_json:
        click.echo(json.dumps([one.plain() for one in compared], indent=2))
    else:
        print_table([COLUMNS, *(one.cells() for one in compared)])
    click.echo(f"page: {out}", err=True)
