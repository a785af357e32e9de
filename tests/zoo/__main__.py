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


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, help="Only these models (several times, or with commas).")
@click.option("--run", "runs", multiple=True, help="Only these runs.")
@click.option("--jobs", default=2, show_default=True, help="Models at a time.")
@click.option("--seconds", default=120.0, show_default=True, help="The time for one model.")
@click.option("--again", is_flag=True, help="Also the runs that FILE has already.")
def run(
    file: Path, only: tuple[str, ...], runs: tuple[str, ...], jobs: int, seconds: float, again: bool
) -> None:
    """Takes tiny models through qplug, and writes the results into FILE (JSON)."""
    from zoo.catalogue import CATALOGUE
    from zoo.results import read_results
    from zoo.run import run as run_models
    from zoo.steps import RUNS

    names = [name for part in only for name in part.split(",")] or list(CATALOGUE)
    wanted = runs or tuple(RUNS)
    if not again:
        done = read_results(file)
        names = [name for name in names if set(wanted) - done.get(name, {}).keys()]
    run_models(names, file, runs=wanted, jobs=jobs, seconds=seconds)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, help="Only these models (several times, or with commas).")
@click.option("--run", default="rtn W4A16 vllm", show_default=True, help="What quantizes them.")
@click.option("--engine", default="vllm-cpu", show_default=True, help="Or vllm-gpu, sglang-gpu.")
@click.option("--jobs", default=1, show_default=True, help="Models quantized at a time.")
def serve(file: Path, only: tuple[str, ...], run: str, engine: str, jobs: int) -> None:
    """Loads tiny models in a real engine, and adds what it answers to FILE (JSON).

    QPLUG_VLLM_PYTHON and QPLUG_SGLANG_PYTHON name the engines' Pythons, as for the engine tests.
    """
    from zoo.results import read_results
    from zoo.serve import serve as serve_models

    done = read_results(file)
    taken = [name for name, found in done.items() if found.get(run, {}).get("outcome") == "ok"]
    names = [name for part in only for name in part.split(",")] or taken
    serve_models(names, file, engine=engine, run=run, jobs=jobs)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
def failures(file: Path) -> None:
    """Prints counts, and the failures in FILE by cause, in Markdown."""
    from zoo.failures import counts
    from zoo.failures import failures as by_cause
    from zoo.results import read_results

    results = read_results(file)
    print(counts(results), by_cause(results), sep="\n\n")


if __name__ == "__main__":
    main()
