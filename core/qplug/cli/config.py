"""``qplug config``: checks and converts recipe files without running them."""

from __future__ import annotations

from pathlib import Path

import click

from qplug.cli.printing import SETTINGS, Command, say, say_json, say_text, warn
from qplug.registry.registry import Registry

_FILE = click.argument("file", type=click.Path(path_type=Path))


@click.group(name="config", context_settings=SETTINGS)
def command() -> None:
    """Check and convert recipes, qplug's own and LLMC's YAML files."""


@command.command(cls=Command)
@_FILE
@click.pass_obj
def check(registry: Registry, file: Path) -> None:
    """Check everything in FILE that can be checked without the model.

    Warnings on stderr name the keys without effect and their lines. The exit status is 1 if FILE
    has a wrong value, or if its algorithms do not fit each other or the scheme.
    """
    from qplug.recipe.check import check as check_job
    from qplug.recipe.files import read_job

    read = read_job(file, registry)
    tell(read.warnings)
    job, recipe = read.job, read.job.recipe
    check_job(job, registry)
    folders = [f"{e.out} ({job.recipe_for(e).backend})" for e in job.exports]
    stages = dict.fromkeys(stage for measurement in job.measurements for stage in measurement.at)
    say(
        f"{file}: valid {read.kind}: {'+'.join(recipe.algorithms)}, {recipe.scheme.name}; "
        f"writes {', '.join(folders) or 'nothing'}; measures {', '.join(stages) or 'nothing'}"
    )


@command.command(cls=Command)
@_FILE
@click.pass_obj
def convert(registry: Registry, file: Path) -> None:
    """Print the native recipe for the job in FILE."""
    from qplug.recipe.check import check_names
    from qplug.recipe.files import read_job
    from qplug.recipe.recipe_file import write_recipe

    read = read_job(file, registry)
    tell(read.warnings)
    check_names(read.job, registry)
    say_text(write_recipe(read.job).rstrip("\n"))


@command.command(cls=Command)
def schema() -> None:
    """Print the JSON Schema of native recipes."""
    from qplug.recipe.recipe_file import schema as recipe_schema

    say_json(recipe_schema())


def tell(warnings: tuple[str, ...]) -> None:
    """Print each warning on a line of stderr."""
    for warning in warnings:
        warn(warning)
