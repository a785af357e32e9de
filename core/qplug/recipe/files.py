"""Reads a job from a file: a native recipe or an LLMC file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qplug.recipe.llmc.file import is_llmc, read_llmc
from qplug.recipe.recipe import Job
from qplug.recipe.recipe_file import read_recipe
from qplug.recipe.yaml_tree import read_yaml
from qplug.registry.registry import Registry


@dataclass(frozen=True)
class ReadJob:
    """A job, the kind of its file in words, and warnings about keys without effect."""

    job: Job
    kind: str
    warnings: tuple[str, ...]


def read_job(path: Path, registry: Registry) -> ReadJob:
    """Read the job in ``path``, a native recipe or an LLMC file.

    Raises QplugError, with file and line, for wrong values. Names that no plugin has are no error
    here: the command line may change them before the job runs, and then the run checks them.
    """
    root = read_yaml(path)
    warnings: list[str] = []
    llmc = is_llmc(root)
    job = read_llmc(root, registry, warnings) if llmc else read_recipe(root, warnings)
    return ReadJob(job, "LLMC file" if llmc else "recipe", tuple(warnings))
