"""Carry out a job: check all of it, then measure, write, and measure again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qplug.api.events import Result
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.output.manifest import read_manifest
from qplug.reading.perplexity import Evaluation, evaluate, evaluation_tokens
from qplug.recipe.check import check
from qplug.recipe.recipe import Export, Job, Measurement, Recipe, Stage
from qplug.registry.registry import Registry
from qplug.run.quantize import SHARD_BYTES, quantize

#: Told what is being done, and of each step of it as ``qplug.run.quantize.Watcher`` is.
Watcher = Callable[[str, int, int, str, "float | None"], None]


@dataclass(frozen=True)
class Measured:
    """A perplexity, and the stage of the model that has it."""

    at: Stage
    evaluation: Evaluation


@dataclass(frozen=True)
class Done:
    """What became of a job. ``kept``: folders that an earlier run of it had finished."""

    results: tuple[Result, ...]
    measured: tuple[Measured, ...]
    kept: tuple[Path, ...] = ()


@dataclass(frozen=True)
class How:
    """What a run is told beside the job: where, and how carefully."""

    device: str = "auto"
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False
    trust_remote_code: bool = False


def perform(
    job: Job,
    *,
    device: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    watch: Watcher | None = None,
) -> Done:
    """Write every folder that ``job`` asks for, and measure what it asks to be measured.

    A stage that is measured and not written is made in a hidden folder, and removed. Folders that
    an earlier run of this job finished are kept, if others are missing. Raises QplugError as
    ``quantize``, before any work where that can be known.
    """
    how = How(device, shard_bytes, overwrite, trust_remote_code)
    work = _Work(job, how, registry or Registry.installed(), watch or (lambda *_: None))
    return work.dry_run() if dry_run else work()


class _Work:
    def __init__(self, job: Job, how: How, registry: Registry, watch: Watcher) -> None:
        if job.model is None:
            raise QplugError("no model is said: give MODEL")
        if not (job.exports or job.measurements):
            raise QplugError("nothing is to be written or measured: give --out")
        self._model, self._job, self._how, self._registry = job.model, job, how, registry
        self._watch = watch
        self._folders = _folders(job)

    def dry_run(self) -> Done:
        """Every check that can be made without the work."""
        results = self._checked(self._job.exports)
        return Done(tuple(results), ())

    def __call__(self) -> Done:
        kept = self._kept()
        todo = [export for export in self._job.exports if export.out not in kept]
        self._checked(todo)
        measured = self._measured("pretrain", self._model)
        results = [self._quantize(export) for export in todo]
        for stage, export in self._folders.items():
            with ExitStack() as stack:
                if self._is_hidden(export):
                    stack.enter_context(_parents(export.out))
                    stack.callback(shutil.rmtree, export.out, ignore_errors=True)
                    self._quantize(export)
                measured += self._measured(stage, str(export.out))
        return Done(tuple(results), tuple(measured), tuple(kept))

    def _is_hidden(self, export: Export) -> bool:
        return export not in self._job.exports

    def _checked(self, exports: Sequence[Export]) -> list[Result]:
        """Dry runs of ``exports``, after all other checks.

        Raises QplugError, with its place in the file if it is known.
        """
        hidden = list(filter(self._is_hidden, self._folders.values()))
        try:
            if not (exports or hidden):
                check(self._job, self._registry)
            for measurement in self._job.measurements:
                self._check_text(measurement)
            for export in hidden:
                self._quantize(export, dry_run=True)
            return [self._quantize(export, dry_run=True) for export in exports]
        except QplugError:
            check(self._job, self._registry)  # finds the same, and says where it stands
            raise

    # --- writing ---------------------------------------------------------------------------------

    def _quantize(self, export: Export, *, dry_run: bool = False) -> Result:
        with _parents(export.out):
            return self._run(export, dry_run=dry_run)

    def _run(self, export: Export, *, dry_run: bool) -> Result:
        how = self._how
        return quantize(
            self._model,
            export.out,
            self._job.recipe_for(export),
            shard_bytes=how.shard_bytes,
            device=how.device,
            overwrite=how.overwrite or self._is_hidden(export),
            dry_run=dry_run,
            trust_remote_code=how.trust_remote_code,
            registry=self._registry,
            watch=lambda *step: self._watch("quantizing", *step),
        )

    def _kept(self) -> list[Path]:
        """Folders that a run of this job wrote, if it was stopped before it wrote all."""
        done = [e.out for e in self._job.exports if not self._how.overwrite and self._is_done(e)]
        return done if len(done) < len(self._job.exports) else []

    def _is_done(self, export: Export) -> bool:
        """Whether ``export.out`` was made of this model by this very recipe."""
        manifest = read_manifest(export.out)
        if manifest is None or manifest.model != self._model:
            return False
        recorded = Recipe.from_dict(manifest.recipe)
        return recorded.to_dict() == self._as_recorded(export, recorded).to_dict()

    def _as_recorded(self, export: Export, recorded: Recipe) -> Recipe:
        """The recipe for ``export`` as its run records it.

        A run records no data where it needs none, and the same recipe needs the same. Float folders
        are fed by float blocks.
        """
        recipe = self._job.recipe_for(export)
        if recipe.calibration is None or recorded.calibration is None:
            return replace(recipe, calibration=None)
        if self._registry.exporters[recipe.backend].format.stores_float:
            return replace(recipe, calibration=replace(recipe.calibration, propagate="float"))
        return recipe

    # --- measuring -------------------------------------------------------------------------------

    def _check_text(self, measurement: Measurement) -> None:
        evaluation_tokens(
            self._model,
            Session(self._registry, trust_remote_code=self._how.trust_remote_code),
            dataset=measurement.dataset,
            dataset_options=measurement.options,
            seq_len=measurement.seq_len,
            windows=measurement.windows,
        )

    def _measured(self, stage: Stage, folder: str) -> list[Measured]:
        found = []
        for measurement in self._job.measurements:
            if stage in measurement.at:
                evaluation = evaluate(
                    folder,
                    dataset=measurement.dataset,
                    dataset_options=measurement.options,
                    seq_len=measurement.seq_len,
                    windows=measurement.windows,
                    device=self._how.device,
                    trust_remote_code=self._how.trust_remote_code,
                    registry=self._registry,
                    watch=lambda done, total: self._watch(
                        f"measuring {stage}", done, total, "", None
                    ),
                )
                found.append(Measured(stage, replace(evaluation, model=folder)))
        return found


def _folders(job: Job) -> dict[Stage, Export]:
    """Where the model of each stage that is measured is: a folder that is written, or a hidden one.

    What an engine loads holds the codes, so the perplexity of its folder is that of the codes.
    """
    wanted = {stage for measurement in job.measurements for stage in measurement.at}
    floats = [export for export in job.exports if job.recipe_for(export).backend == "hf"]
    coded = [export for export in job.exports if export not in floats]
    beside = job.exports[0].out if job.exports else Path("qplug")
    folders: dict[Stage, Export] = {}
    if "transformed" in wanted:
        hidden = Export(beside.with_name(f".{beside.name}.transformed"), "hf")
        folders["transformed"] = floats[0] if floats else hidden
    if "quantized" in wanted:
        hidden = Export(beside.with_name(f".{beside.name}.measured"), "fake")
        folders["quantized"] = coded[0] if coded else hidden
    return folders


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Makes the folders above ``out`` that are missing; removes those that are empty in the end."""
    made = []
    for parent in (*reversed(out.absolute().parents[:-1]), out.absolute().parent):
        if not parent.is_dir():
            try:
                parent.mkdir()
            except OSError as error:
                raise QplugError(f"{parent}: cannot be made: {error.strerror}") from error
            made.append(parent)
    try:
        yield
    finally:
        for parent in reversed(made):
            with suppress(OSError):  # not empty: it is used
                parent.rmdir()
