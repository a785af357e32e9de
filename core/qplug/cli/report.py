"""``qplug report``."""

from __future__ import annotations

from pathlib import Path

import click

from qplug.cli.page_writing import beside, write_report
from qplug.cli.text_options import TextOptions, text_options
from qplug.registry.registry import Registry


@click.command(name="report")
@click.argument("folder")
@click.option("--out", type=click.Path(path_type=Path), help="By default FOLDER.report.html.")
@click.option("--against", metavar="MODEL", help="The float model; by default as recorded.")
@click.option("--perplexity", is_flag=True, help="Measure it, and that of the float model.")
@text_options
@click.pass_obj
def command(
    registry: Registry,
    folder: str,
    out: Path | None,
    against: str | None,
    perplexity: bool,
    dataset: str,
    dataset_options: tuple[str, ...],
    seq_len: int,
    windows: int,
    device: str,
    trust_remote_code: bool,
) -> None:
    """Write one HTML file on the quantized FOLDER: sizes, errors, ranges, how to serve it.

    It fetches nothing, and can be mailed. What a run took only qplug quantize --report can tell.
    """
    from qplug.checkpoint.locate import find_model
    from qplug.machine.session import Session
    from qplug.reading.folder import open_folder
    from qplug.reading.verify import find_source
    from qplug.report.frame import check_target

    file = out or beside(find_model(folder))
    check_target(file)
    measured = {}
    if perplexity:
        text = TextOptions(dataset, dataset_options, seq_len, windows, device, trust_remote_code)
        opened = open_folder(folder, Session(registry, trust_remote_code=trust_remote_code))
        source, _ = find_source(opened, against)
        if source is not None:
            measured["float"] = [text.measure(source, registry)]
        measured["quantized"] = [text.measure(folder, registry)]
    write_report(
        folder,
        file,
        registry,
        against=against,
        trust_remote_code=trust_remote_code,
        measured=measured,
    )
    click.echo(f"{folder}: report in {file}")
