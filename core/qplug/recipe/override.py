"""A job with what the command line says in place of what the file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qplug.errors import QplugError
from qplug.recipe.job import Export, Job
from qplug.recipe.recipe import Calibration, parse_algorithms, parse_scheme


@dataclass(frozen=True)
class Given:
    """What the user gave beside the file; None, or nothing in a mapping, leaves it as it is."""

    model: str | None = None
    out: Path | None = None
    backend: str | None = None
    backend_options: Mapping[str, Any] | None = None
    algo: str | None = None
    options: Mapping[str, Mapping[str, Any]] | None = None
    scheme: str | None = None
    group_size: int | None = None
    overrides: Mapping[str, str] | None = None
    ignore: tuple[str, ...] | None = None
    dataset: str | None = None
    dataset_options: Mapping[str, Any] | None = None
    samples: int | None = None
    seq_len: int | None = None
    propagate: str | None = None
    sampling: str | None = None
    seed: int | None = None


def overridden(job: Job, given: Given) -> Job:
    """``job`` as ``given`` has it. Patterns are added to those of the file; later ones win."""
    algorithms = parse_algorithms(given.algo) if given.algo else job.algorithms
    scheme = job.scheme
    if given.scheme is not None or given.group_size is not None:
        scheme = parse_scheme(given.scheme or job.scheme, given.group_size)
    added = tuple((p, parse_scheme(name)) for p, name in (given.overrides or {}).items())
    return replace(
        job,
        model=given.model or job.model,
        algorithms=algorithms,
        algorithm_options=_options(job, algorithms, given.options or {}),
        scheme=scheme,
        overrides=job.overrides + added,
        ignore=job.ignore + (given.ignore or ()),
        calibration=_calibration(job, given),
        seed=job.seed if given.seed is None else given.seed,
        exports=_exports(job, given),
    )


def _options(
    job: Job, algorithms: tuple[str, ...], given: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    for name in given:
        if name not in algorithms:
            raise QplugError(f"-o {name}...: {name} is not in the pipeline")
    kept = {name: told for name, told in job.algorithm_options.items() if name in algorithms}
    return {**kept, **{name: {**kept.get(name, {}), **told} for name, told in given.items()}}


def _calibration(job: Job, given: Given) -> Calibration:
    told = job.calibration
    options = told.options if given.dataset in (None, told.dataset) else {}
    return replace(
        told,
        dataset=given.dataset or told.dataset,
        options={**options, **(given.dataset_options or {})},
        samples=given.samples or told.samples,
        seq_len=given.seq_len or told.seq_len,
        propagate=given.propagate or told.propagate,
        sampling=given.sampling or ("dataset" if given.dataset else told.sampling),
    )


def _exports(job: Job, given: Given) -> tuple[Export, ...]:
    if given.out is None and given.backend is None and not given.backend_options:
        return job.exports
    if len(job.exports) > 1:
        raise QplugError("--out, --backend: the file names several folders to write; change them")
    if not job.exports and given.out is None:
        raise QplugError("--backend: say with --out where to write")
    export = job.exports[0] if job.exports else Export(given.out or Path())
    options = {} if given.backend else export.options
    return (
        Export(
            given.out or export.out,
            given.backend or export.backend,
            {**options, **(given.backend_options or {})},
        ),
    )
