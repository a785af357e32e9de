"""One run, from a checkpoint to a quantized folder, step by step."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qplug.api import ModelView
from qplug.api.events import Result, RunPlan
from qplug.api.scheme import Scheme
from qplug.calibration.samples import Samples
from qplug.calibration.tokens import calibration_tokens
from qplug.checkpoint.config_file import CONFIG
from qplug.errors import QplugError
from qplug.machine.memory import naming_memory, parse_size
from qplug.machine.session import Session
from qplug.model.foreign import naming_file
from qplug.model.kv_cache import KVCache
from qplug.model.skeleton import Skeleton
from qplug.output.fingerprint import fingerprint
from qplug.output.ownership import refuse_existing
from qplug.output.parent_folders import parent_folders
from qplug.output.plan import make_plan
from qplug.output.result_files import result_files
from qplug.output.shared_writer import SharedWriter
from qplug.output.source_bytes import SourceBytes
from qplug.output.step_report import Report
from qplug.output.unfinished import clean_up
from qplug.output.writer import Writer
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.words import RecipeWords, changed
from qplug.registry.registry import Registry
from qplug.run.calibrated import calibrated, start_walk
from qplug.run.check import check_quality
from qplug.run.drafts import open_model
from qplug.run.learning import LearnOnce
from qplug.run.memory_needs import memory_needs
from qplug.run.planned import run_plan, run_start
from qplug.run.prepare import prepare, with_float_experts_stacked
from qplug.run.refuse import open_source, refuse_unplanned, servable_cache
from qplug.run.stages import Stages
from qplug.run.steps import Finished, Steps
from qplug.run.stop_at import StopAt, refuse_blind
from qplug.run.streamed import streamed
from qplug.run.watchers import Watcher, Watchers

if TYPE_CHECKING:
    from typing_extensions import Unpack

SHARD_BYTES = 5_000_000_000


def quantize(
    model: str,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    memory: str | None = None,
    check: bool = False,
    stop_at: float | None = None,
    registry: Registry | None = None,
    watch: Watcher | None = None,
    **words: Unpack[RecipeWords],
) -> Result:
    """Quantize ``model`` (a folder, a Hub id, or ``qplug:demo``) into the new folder ``out``.

    ``recipe`` says how, and ``words`` change it: see ``RecipeWords``. ``algo`` is one algorithm or
    several (``"awq+gptq"``). Algorithms that need data receive ``samples`` windows of ``seq_len``
    tokens of ``dataset``. The hidden states that enter the next block come from the quantized block
    (``propagate="quantized"``) or from the float block (``propagate="float"``). The ranges of
    static inputs, which ``observer`` determines, and the scales of ``kv_cache="fp8"`` need data
    too. ``memory`` ("20GiB") is what a block may take on the device, by default what is free; the
    experts of a block that takes more are quantized in portions. ``check`` measures perplexity and
    KL divergence from the float model on text that calibration has not seen, ``Result.quality``.
    ``stop_at`` stops a calibrated run after a block whose output is further from the float model's:
    the limit of the mean over calibration tokens of ``||x' - x|| / ||x||``, where ``x`` and ``x'``
    are the hidden states after the block in the float and in the quantized model.

    Returns the folder, its size in bytes, the error of each layer and the seconds that the run
    took. If a run was killed, the same call continues it. Raises QplugError for mistakes that the
    user can mend, before any work if they can be detected then; a refused run leaves no files
    behind. If every process that torchrun started makes the same call, the processes share the work
    of a calibrated run, and the first process writes the folder.
    """
    recipe = changed(recipe or Recipe(), words)
    recipe.check()
    with (
        Session.joined(
            device,
            registry=registry,
            trust_remote_code=trust_remote_code,
            memory=None if memory is None else parse_size(memory),
        ) as session,
        session.registry.blaming(),  # a plugin's SystemExit must not end the caller's program
    ):
        return run(
            model,
            Path(out),
            Stages(recipe, session),
            session,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            dry_run=dry_run,
            check=check,
            stop_at=stop_at,
            watch=watch or (lambda *_: None),
        )


def run(
    model: str,
    out: Path,
    stages: Stages,
    session: Session,
    *,
    shard_bytes: int,
    overwrite: bool,
    dry_run: bool,
    watch: Watcher,
    check: bool = False,
    stop_at: float | None = None,
) -> Result:
    """Quantize ``model`` into ``out`` by ``stages``, and return the result.

    Missing parents of ``out`` are made. Raises QplugError. All checks come before the first weight
    is read and the first file written.
    """
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(parent_folders(out))
            if not dry_run:
                clean_up(out)
            refuse_existing(out, overwrite=overwrite)

        session.processes.from_first(begin)
        return _run(
            model,
            out,
            stages,
            session,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            dry_run=dry_run,
            check=check,
            stop_at=stop_at,
            watch=watch,
        )


def _run(
    model: str,
    out: Path,
    stages: Stages,
    session: Session,
    *,
    shard_bytes: int,
    overwrite: bool,
    dry_run: bool,
    check: bool,
    stop_at: float | None,
    watch: Watcher,
) -> Result:
    """Does the work of ``run``; the parent of ``out`` exists."""
    began, clock = time.monotonic(), session.clock
    recipe, exporter = stages.recipe, stages.exporter
    watchers = Watchers(session, watch)
    watchers.stage_begun("opening")
    refuse_blind(stop_at, stages)
    source, skeleton = open_source(model, out, exporter, session)
    with clock("opening"):
        source, view = open_model(recipe, source, session, skeleton)
        prepared = prepare(stages, source, view, session)  # rewrites apply when a tensor is read
    decision = stages.decide(source, prepared.view)
    schemes, narrow, share = decision.schemes, decision.narrow, decision.share
    cache = servable_cache(recipe.kv_cache, source, prepared.view, exporter, session)
    coded = {} if exporter.format.stores_float else schemes
    prepared = with_float_experts_stacked(prepared, coded)
    with session.registry.blaming(exporter, "layout"):
        plan = make_plan(  # fixes the position of every byte of the result
            prepared.checkpoint,
            prepared.view,
            coded,
            exporter,
            shard_bytes=shard_bytes,
            by_block=recipe.calibration is not None,
            cache_scales={b: cache.scale_names(b) for b in prepared.view.blocks} if cache else {},
        )
    refuse_unplanned(plan, coded, exporter)
    samples = _samples(recipe, model, prepared.view, session, watchers)
    what = run_plan(model, source, stages, plan, prepared, samples, session)
    if dry_run:
        return Result(
            out,
            {},
            {},
            prepared.notes,
            what.source_bytes,
            plan.nbytes,
            0.0,
            0,
            dry_run=True,
            float_share=share.total,
            floats=share.kinds,
            kept_float=narrow,
            source_format=source.quantized,
            plan=what,
        )

    mark = fingerprint(source, recipe, session, shard_bytes, samples, learns=bool(stages.learning))
    source_bytes = SourceBytes(
        plan,
        prepared.checkpoint,
        # The steps of a calibrated run depend on one another: its blocks pass tokens on.
        prepared.view.blocks if recipe.calibration else (),
    )
    make_writer = partial(
        Writer,
        out,
        plan,
        mark,
        source_bytes,
        overwrite=overwrite,
        companions=source.companions(),
        single_file=exporter.format.single_file.name if exporter.format.single_file else None,
        learned=stages.learning,
        spare=plan.nbytes if exporter.format.single_file else 0,  # for a moment both are on disk
    )
    reports: dict[int, Report] = {}
    with (
        SharedWriter(session.processes, make_writer) as output,
        session.registry.blaming(),  # ends first: the writer removes what a plugin's exit leaves
        naming_memory(lambda: memory_needs(plan, len(reports), samples, view, session)),
        naming_file(source.folder / CONFIG, "the model does not run"),
    ):
        done = output.finished()
        watchers.run_begun(run_start(out, plan, len(done), what, prepared))
        if samples is not None and stages.learning:
            watchers.stage_begun("learning")
            learn = LearnOnce(stages, schemes, samples, output, session)
            prepared = with_float_experts_stacked(
                prepare(stages, source, view, session, learn=learn), coded
            )
        reports |= {number: Report.from_dict(plain) for number, plain in done.items()}
        steps = Steps(
            stages,
            plan,
            prepared,
            watchers,
            session,
            StopAt.of(stop_at, stages, plan, prepared.view),
        )
        finished = _computed(steps, schemes, samples, cache, skeleton, output, source_bytes, done)
        for step in finished:
            with clock("writing"):
                output.write(step.number, step.contents, step.report.to_dict(), step.read)
            reports[step.number] = step.report
            watchers.step_written(plan.steps[step.number].name, step.report)
        watchers.stage_begun("writing")
        shared = session.processes.from_first(lambda: reports)
        reported = [shared[number] for number in range(len(plan.steps))]
        with session.registry.blaming(exporter, "config.json"):
            texts, record = result_files(
                model,
                prepared.view,
                recipe,
                exporter,
                coded,
                reported,
                session.registry,
                online=prepared.online,
                notes=prepared.notes,
                kept_float=narrow,
            )
        with clock("writing"):
            output.finish(
                texts, record, lambda folder: stages.convert(folder, prepared.view, coded)
            )
    result = Result(
        out=out,
        errors={name: error for report in reported for name, error in report.errors.items()},
        losses={name: loss for report in reported for name, loss in report.losses.items()},
        notes=prepared.notes + tuple(note for report in reported for note in report.notes),
        source_bytes=what.source_bytes,
        bytes=plan.nbytes,
        seconds=time.monotonic() - began,
        resumed=len(done),
        stages=clock.costs(),
        float_share=share.total,
        floats=share.kinds,
        kept_float=narrow,
        source_format=source.quantized,
    )
    watchers.run_done(result)
    if check and result.errors:
        result = _checked(result, what, view, samples, recipe.calibration, session, watchers)
    return result


def _checked(
    result: Result,
    plan: RunPlan,
    view: ModelView,
    samples: Samples | None,
    data: Calibration | None,
    session: Session,
    watchers: Watchers,
) -> Result:
    """``result`` with its quality, or with a note on why the quality is not known."""
    watchers.stage_begun("checking")
    try:
        with session.clock("checking"):
            quality = check_quality(result, plan, view, data, samples, session)
    except QplugError as error:
        note = f"the quality was not measured: {error}"
        return replace(result, notes=(*result.notes, note))
    return replace(result, quality=quality, stages=session.clock.costs())


def _computed(
    steps: Steps,
    schemes: Mapping[str, Scheme],
    samples: Samples | None,
    cache: KVCache | None,
    skeleton: Skeleton,
    output: SharedWriter,
    source_bytes: SourceBytes,
    done: Collection[int],
) -> Iterator[Finished]:
    """The steps of a run that are not ``done``, which are computed one by one."""
    if samples is None:
        steps.watchers.stage_begun("blocks")
        return streamed(steps, done, source_bytes)
    steps.watchers.stage_begun("trial pass")
    # The walk is not a local: a stored traceback would keep its hidden states alive.
    finished = calibrated(steps, start_walk(steps, schemes, samples, cache, skeleton), output, done)
    steps.watchers.stage_begun("blocks")
    return finished


def _samples(
    recipe: Recipe, model: str, view: ModelView, session: Session, watchers: Watchers
) -> Samples | None:
    """The calibration samples; None if no algorithm needs data."""
    data = recipe.calibration
    if data is None:
        return None
    watchers.stage_begun("data")
    with session.clock("data"):
        return session.processes.from_first(
            lambda: calibration_tokens(data, model, view, session, seed=recipe.seed)
        )
