"""``qplug compare``."""

from __future__ import annotations

from pathlib import Path

import click

from qplug.cli.printed_table import print_table
from qplug.cli.printing import Command, note, say_json
from qplug.cli.text_options import TextOptions, text_options
from qplug.registry.registry import Registry


@click.command(name="compare", cls=Command)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="qplug-compare.html",
    show_default=True,
    help="The HTML file to write.",
)
@click.option(
    "--perplexity", is_flag=True, help="Measure the perplexities, and plot them against the sizes."
)
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
    """Compare several models, float or quantized: sizes, errors, perplexities.

    Prints a table, and writes the table and a plot to an HTML file.
    """
    from qplug.machine.session import Session
    from qplug.reading.folder import open_folder
    from qplug.report.comparison import COLUMNS, Compared, comparison_page
    from qplug.report.examine import overview
    from qplug.report.page_file import check_target, write

    check_target(out)
    session = Session(registry, trust_remote_code=trust_remote_code)
    # Opens all folders before it measures any, so that a wrong name is reported at once.
    overviews = [overview(open_folder(name, session, or_float=True), name) for name in folders]
    text = TextOptions(dataset, dataset_options, seq_len, windows, device, trust_remote_code)
    compared = [
        Compared(summary, text.measure(summary.folder, registry) if perplexity else None)
        for summary in overviews
    ]
    write(out, comparison_page(compared))
    if as_json:
        say_json([folder.plain() for folder in compared])
    else:
        print_table([COLUMNS, *(folder.cells() for folder in compared)])
    note(f"page: {out}")
