"""Runs a job: checks all of it, measures the model, writes the folders, and measures them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qplug.api.events import Result
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.output.manifest import read_manifest
from qplug.output.origins import public_name, public_values
from qplug.output.ownership import remove_own
from qplug.output.parent_folders import parent_folders
from qplug.reading.perplexity import Evaluation, evaluate, evaluation_tokens
from qplug.recipe.check import check
from qplug.recipe.recipe import Export, Job, Measurement, Recipe, Stage
from qplug.registry.registry import Registry
from qplug.run.choose import Chosen, has_asked
from qplug.run.quantize import SHARD_BYTES, quantize_by
from qplug.run.stop_at import OnStop

#: Called after each step of a job: activity, steps done, steps in all, name of the step, its loss.
Watcher = Callable[[str, int, int, str, "float | None"], None]


@dataclass(frozen=True)
class Measured:
    """A perplexity, and the stage at which the model was measured."""

    at: Stage
    evaluation: Evaluation


@dataclass(frozen=True)
class JobResult:
    """The results of a job.

    ``results`` has one entry for each folder that this run wrote, ``measured`` one for each
    perplexity. ``kept``: folders that an earlier run of the same job had finished.
    """

    results: tuple[Result, ...]
    measured: tuple[Measured, ...]
    kept: tuple[Path, ...] = ()


@dataclass(frozen=True)
class RunOptions:
    """The options of a run that are not part of the job: they do not change the weights.

    ``device`` is "auto", "cpu" or "cuda[:N]"; ``shard_bytes`` the size of a weight file in bytes;
    ``memory`` what a block may take on the device, such as "20GiB". ``check`` measures the quality
    of each folder; ``stop_at`` and ``on_stop`` stop a run, or raise blocks: see ``qplug.quantize``.
    """

    device: str = "auto"
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False
    trust_remote_code: bool = False
    memory: str | None = None
    check: bool = False
    stop_at: float | None = None
    on_stop: OnStop = "stop"


def perform(
    job: Job,
    *,
    device: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    memory: str | None = None,
    check: bool = False,
    stop_at: float | None = None,
    on_stop: OnStop = "stop",
    registry: Registry | None = None,
    watch: Watcher | None = None,
) -> JobResult:
    """Write every folder that ``job`` asks for, and measure the perplexities that it asks for.

    A stage that the job measures but does not write goes into a hidden folder, which is removed
    afterwards. If an earlier run of this job finished some of the folders, they are kept and only
    the others are written. Raises QplugError for mistakes that the user can mend, before any work
    is done if they can be detected then.
    """
    options = RunOptions(
        device, shard_bytes, overwrite, trust_remote_code, memory, check, stop_at, on_stop
    )
    runner = _JobRunner(job, options, registry or Registry.installed(), watch or (lambda *_: None))
    return runner.dry_run() if dry_run else runner()


class _JobRunner:
    def __init__(self, job: Job, options: RunOptions, registry: Registry, watch: Watcher) -> None:
        if job.model is None:
            raise QplugError("the job names no model: give MODEL")
        if not (job.exports or job.measurements):
            raise QplugError("the job writes and measures nothing: give --out")
        self._model, self._job, self._options, self._registry = job.model, job, options, registry
        self._watch = watch
        self._choices: dict[Path, Chosen] = {}  # by folder, for recipes with --scheme auto
        self._folders = _folders(job, registry)

    def dry_run(self) -> JobResult:
        """Run every check that needs no weights, and return the results of the dry runs."""
        results = self._checked(self._job.exports)
        return JobResult(tuple(results), ())

    def __call__(self) -> JobResult:
        kept = self._kept()
        todo = [export for export in self._job.exports if export.out not in kept]
        self._checked(todo)
        measured = self._measured("pretrain", self._model)
        results = [self._quantize(export) for export in todo]
        for stage, export in self._folders.items():
            with ExitStack() as stack:
                if self._is_hidden(export):
                    stack.enter_context(parent_folders(export.out))
                    self._quantize(export)
                    stack.callback(remove_own, export.out)  # it was refused if it was not qplug's
                measured += self._measured(stage, str(export.out))
        return JobResult(tuple(results), tuple(measured), tuple(kept))

    def _is_hidden(self, export: Export) -> bool:
        return export not in self._job.exports

    def _checked(self, exports: Sequence[Export]) -> list[Result]:
        """Run all checks, and return the results of dry runs of ``exports``.

        Raises QplugError for the first mistake, with its place in the file if that is known.
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
            check(self._job, self._registry)  # raises the same error with its place in the file
            raise

    # --- writing ---------------------------------------------------------------------------------

    def _quantize(self, export: Export, *, dry_run: bool = False) -> Result:
        options = self._options
        recipe = self._job.recipe_for(export)
        recipe.check()
        return quantize_by(
            self._model,
            export.out,
            recipe,
            self._choices,
            shard_bytes=options.shard_bytes,
            device=options.device,
            overwrite=options.overwrite or self._is_hidden(export),
            dry_run=dry_run,
            trust_remote_code=options.trust_remote_code,
            memory=options.memory,
            check=options.check and not self._is_hidden(export),
            stop_at=options.stop_at,
            on_stop=options.on_stop,
            registry=self._registry,
            watch=lambda *step: self._watch("quantizing", *step),
        )

    def _kept(self) -> list[Path]:
        """The folders that an earlier, interrupted run of this job finished.

        None of them if that run finished all folders: then this run starts again.
        """
        done = [
            e.out for e in self._job.exports if not self._options.overwrite and self._is_done(e)
        ]
        return done if len(done) < len(self._job.exports) else []

    def _is_done(self, export: Export) -> bool:
        """Whether ``export.out`` was written from this model by an equal recipe."""
        manifest = read_manifest(export.out)
        if manifest is None or manifest.model != public_name(self._model):
            return False
        if manifest.choice:  # the schemes were chosen: the job is equal if it asks for the same
            return has_asked(manifest.choice, self._job.recipe_for(export))
        recorded = Recipe.from_dict(manifest.asked or manifest.recipe)
        wanted = public_values(self._as_recorded(export, recorded).to_dict())
        return bool(public_values(recorded.to_dict()) == wanted)

    def _as_recorded(self, export: Export, recorded: Recipe) -> Recipe:
        """The recipe for ``export`` as a run records it in ``qplug.json``.

        A run that needs no calibration data records None instead of the data. A run that exports
        float weights records ``propagate="float"``, since no block is quantized.
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
            Session(self._registry, trust_remote_code=self._options.trust_remote_code),
            dataset=measurement.dataset,
            dataset_options=measurement.options,
            seq_len=measurement.seq_len,
            windows=measurement.windows,
        )

    def _measured(self, stage: Stage, folder: str) -> list[Measured]:
        measured = []
        for measurement in self._job.measurements:
            if stage in measurement.at:
                evaluation = evaluate(
                    folder,
                    dataset=measurement.dataset,
                    dataset_options=measurement.options,
                    seq_len=measurement.seq_len,
                    windows=measurement.windows,
                    device=self._options.device,
                    trust_remote_code=self._options.trust_remote_code,
                    registry=self._registry,
                    watch=lambda done, total: self._watch(
                        f"measuring {stage}", done, total, "", None
                    ),
                )
                measured.append(Measured(stage, replace(evaluation, model=folder)))
        return measured


def _folders(job: Job, registry: Registry) -> dict[Stage, Export]:
    """The folder in which the model of each measured stage lies: an export, or a hidden folder.

    The stage "quantized" is measured on an engine's folder, since that folder contains the codes.
    """
    wanted = {stage for measurement in job.measurements for stage in measurement.at}
    floats = [
        export
        for export in job.exports
        if registry.exporters[job.recipe_for(export).backend].format.stores_float
    ]
    coded = [export for export in job.exports if export not in floats]
    first = job.exports[0].out if job.exports else Path("qplug")
    folders: dict[Stage, Export] = {}
    if "transformed" in wanted:
        hidden = Export(first.with_name(f".{first.name}.transformed"), "hf")
        folders["transformed"] = floats[0] if floats else hidden
    if "quantized" in wanted:
        hidden = Export(first.with_name(f".{first.name}.measured"), "fake")
        folders["quantized"] = coded[0] if coded else hidden
    return folders
