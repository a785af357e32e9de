"""The program: ``python -m zoo make NAME FOLDER`` writes one tiny checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import click

# Matrices are small, and threads that wait for a busy core cost seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@click.group()
def main() -> None:
    """Tiny random checkpoints of every architecture, and what qplug makes of them."""


@main.command("list")
def list_names() -> None:
    """Prints the names of the tiny models, by family."""
    from zoo.catalogue import FAMILIES

    for family, models in FAMILIES.items():
        print(f"{family}: {' '.join(models)}")


@main.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
def make(name: str, folder: Path) -> None:
    """Writes the tiny model NAME into FOLDER."""
    from zoo.make import make as write

    write(name, folder)


if __name__ == "__main__":
    main()
