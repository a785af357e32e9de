"""Writes the folder of a planned run, step by step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from qplug.checkpoint.config_file import CONFIG
from qplug.machine.memory import naming_memory
from qplug.model.foreign import naming_file
from qplug.output.fingerprint import fingerprint
from qplug.output.origins import public_values, remember_origin
from qplug.output.result_files import result_files
from qplug.output.shared_writer import SharedWriter
from qplug.output.source_bytes import SourceBytes
from qplug.output.step_report import Report
from qplug.output.writer import Writer
from qplug.run.block_watch import BlockWatch
from qplug.run.calibrated import calibrated, start_walk
from qplug.run.description import start_of
from qplug.run.learning import LearnOnce
from qplug.run.memory_needs import memory_needs
from qplug.run.planned import PlannedRun
from qplug.run.prepare import Prepared, prepare
from qplug.run.steps import Finished, Steps
from qplug.run.stop_at import Limit
from qplug.run.streamed import streamed
from qplug.run.watchers import Watchers


@dataclass(frozen=True, eq=False)
class WrittenRun:
    """A folder that is written: the model as it was rewritten, and the reports of all steps.

    ``run`` is the run with the blocks that were raised.
    """

    run: PlannedRun
    prepared: Prepared
    reports: Sequence[Report]
    resumed: int


def write_run(
    run: PlannedRun, watchers: Watchers, limit: Limit | None, *, overwrite: bool
) -> WrittenRun:
    """Computes the steps of ``run`` that no earlier run has finished, and writes the folder."""
    stages, session, plan = run.stages, run.session, run.plan
    prepared, samples, clock = run.prepared, run.samples, session.clock
    reports: dict[int, Report] = {}
    source_bytes = SourceBytes(
        plan,
        prepared.checkpoint,
        # The steps of a calibrated run depend on one another: its blocks pass tokens on.
        run.view.blocks if samples is not None else (),
    )
    with (
        SharedWriter(
            session.processes, lambda: _writer(run, source_bytes, overwrite=overwrite)
        ) as output,
        session.registry.blaming(),  # ends first: the writer removes what a plugin's exit leaves
        naming_memory(lambda: memory_needs(plan, len(reports), samples, run.view, session)),
        naming_file(run.source.folder / CONFIG, "the model does not run"),
    ):
        done = output.finished()
        run = run.with_raised(output.raised())
        plan = run.plan
        watchers.run_begun(start_of(run.out, plan, len(done), run.what, prepared))
        if samples is not None and stages.learning:
            watchers.stage_begun("learning")
            learn = LearnOnce(stages, run.decision.schemes, samples, output, session)
            prepared = run.learned(prepare(stages, run.source, run.view, session, learn=learn))
        reports |= {number: Report.from_dict(plain) for number, plain in done.items()}
        watch = None if limit is None else BlockWatch(limit, run)
        steps = Steps(run.stages, plan, prepared, watchers, session, watch)
        for step in _computed(run, steps, output, source_bytes, done):
            with clock("writing"):
                output.write(step.number, step.contents, step.report.to_dict())
            reports[step.number] = step.report
            watchers.step_written(plan.steps[step.number].name, step.report)
        watchers.stage_begun("writing")
        shared = session.processes.from_first(lambda: reports)
        reported = [shared[number] for number in range(len(plan.steps))]
        run = run if watch is None else watch.run
        _finish(run, prepared, reported, output)
    return WrittenRun(run, prepared, reported, len(done))


def _writer(run: PlannedRun, source_bytes: SourceBytes, *, overwrite: bool) -> Writer:
    """Opens the unfinished folder of ``run``."""
    stages, single = run.stages, run.stages.exporter.format.single_file
    mark = fingerprint(
        run.source,
        stages.recipe,
        run.session,
        run.shard_bytes,
        run.samples,
        learns=bool(stages.learning),
    )
    return Writer(
        run.out,
        run.plan,
        mark | run.record_of_choice,
        source_bytes,
        overwrite=overwrite,
        companions=run.source.companions(),
        single_file=single.name if single else None,
        learned=stages.learning,
        spare=run.plan.nbytes if single else 0,  # for a moment both are on disk
        replan=None if run.raising is None else lambda raised: run.with_raised(raised).plan,
    )


def _computed(
    run: PlannedRun,
    steps: Steps,
    output: SharedWriter,
    source_bytes: SourceBytes,
    done: Collection[int],
) -> Iterator[Finished]:
    """The steps of a run that are not ``done``, which are computed one by one."""
    if run.samples is None:
        steps.watchers.stage_begun("blocks")
        return streamed(steps, done, source_bytes)
    steps.watchers.stage_begun("trial pass")
    # The walk is not a local: a stored traceback would keep its hidden states alive.
    finished = calibrated(
        steps,
        start_walk(steps, run.decision.schemes, run.samples, run.cache, run.skeleton, source_bytes),
        output,
        done,
    )
    steps.watchers.stage_begun("blocks")
    return finished


def _finish(
    run: PlannedRun, prepared: Prepared, reported: Sequence[Report], output: SharedWriter
) -> None:
    """Adds the other files of the folder, and gives it its name."""
    stages, session, exporter = run.stages, run.session, run.stages.exporter
    with session.registry.blaming(exporter, "config.json"):
        texts, record = result_files(
            run.model,
            run.source.folder,
            prepared.view,
            stages.recipe,
            exporter,
            run.coded,
            reported,
            session.registry,
            online=prepared.online,
            notes=prepared.notes,
            kept_float=run.decision.narrow,
            raised=run.raising.raised if run.raising is not None else (),
        )
    with session.clock("writing"):
        output.finish(
            texts,
            {**record, **public_values(run.record_of_choice | run.record_of_raised)},
            lambda folder: stages.convert(folder, prepared.view, run.coded),
        )
    session.processes.from_first(lambda: remember_origin(record, run.model))
