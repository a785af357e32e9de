"""One run, from a checkpoint to a quantized folder: plan, write, check."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qplug.api.events import Result
from qplug.errors import QplugError
from qplug.machine.memory import parse_size
from qplug.machine.read_ahead import read_ahead
from qplug.machine.session import Session
from qplug.machine.turns import short_turns
from qplug.output.ownership import refuse_existing
from qplug.output.parent_folders import parent_folders
from qplug.output.unfinished import clean_up
from qplug.recipe.recipe import Recipe
from qplug.recipe.words import RecipeWords, changed
from qplug.registry.registry import Registry
from qplug.run.check import check_quality
from qplug.run.choose import Chosen, choose
from qplug.run.planned import PlannedRun, plan_run
from qplug.run.stages import Stages
from qplug.run.stop_at import Limit, OnStop
from qplug.run.warm_up import warmed_up
from qplug.run.watchers import Watcher, Watchers
from qplug.run.written import WrittenRun, write_run

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
    on_stop: OnStop = "stop",
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
    experts of a block that takes more are quantized in portions, and so are the input groups of one
    without experts where the algorithm allows it. ``check`` measures perplexity and
    KL divergence from the float model on text that calibration has not seen, ``Result.quality``.
    ``stop_at`` stops a calibrated run after a block whose output is further from the float model's:
    the limit of the mean over calibration tokens of ``||x' - x|| / ||x||``, where ``x`` and ``x'``
    are the hidden states after the block in the float and in the quantized model. With
    ``on_stop="raise"`` such a block gets more bits instead, 8 and then float weights, and the run
    stops only if that is not enough: ``Result.raised``. Blocks after it are calibrated on the
    raised block.

    Returns the folder, its size in bytes, the error of each layer and the seconds that the run
    took. If a run was killed, the same call continues it. Raises QplugError for mistakes that the
    user can mend, before any work if they can be detected then; a refused run leaves no files
    behind. If every process that torchrun started makes the same call, the processes share the work
    of a calibrated run, and the first process writes the folder.
    """
    recipe = changed(recipe or Recipe(), words)
    recipe.check()
    return quantize_by(
        model,
        Path(out),
        recipe,
        {},
        shard_bytes=shard_bytes,
        device=device,
        overwrite=overwrite,
        dry_run=dry_run,
        trust_remote_code=trust_remote_code,
        memory=memory,
        check=check,
        stop_at=stop_at,
        on_stop=on_stop,
        registry=registry,
        watch=watch or (lambda *_: None),
    )


def quantize_by(
    model: str,
    out: Path,
    recipe: Recipe,
    choices: MutableMapping[Path, Chosen],
    *,
    shard_bytes: int,
    device: str,
    overwrite: bool,
    dry_run: bool,
    trust_remote_code: bool,
    memory: str | None,
    check: bool,
    stop_at: float | None,
    on_stop: OnStop,
    registry: Registry | None,
    watch: Watcher,
) -> Result:
    """``quantize`` by a checked ``recipe``.

    ``choices`` are those for recipes with ``--scheme auto``, by folder: a choice that is not among
    them is made, and added. A dry run and the run after it need one choice.
    """
    with (
        Session.joined(
            device,
            registry=registry,
            trust_remote_code=trust_remote_code,
            memory=None if memory is None else parse_size(memory),
        ) as session,
        short_turns(),
        session.registry.blaming(),  # a plugin's SystemExit must not end the caller's program
    ):
        chosen = None
        if recipe.is_auto:
            if os.path.lexists(out):  # else its parent is made later
                refuse_existing(out, overwrite=overwrite)
            if out not in choices:
                read_ahead("models")
                choices[out] = choose(model, out, recipe, session)
            chosen = choices[out]
        return run(
            model,
            out,
            Stages(recipe if chosen is None else chosen.recipe, session),
            session,
            chosen=chosen,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            dry_run=dry_run,
            check=check,
            stop_at=stop_at,
            on_stop=on_stop,
            watch=watch,
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
    on_stop: OnStop = "stop",
    chosen: Chosen | None = None,
) -> Result:
    """Quantize ``model`` into ``out`` by ``stages``, and return the result.

    Missing parents of ``out`` are made. ``chosen`` is the choice that the recipe of ``stages``
    comes from. Raises QplugError. All checks come before the first weight is read and the first
    file written.
    """
    if stages.compute_models(check=check, dry_run=dry_run):
        read_ahead("models")
    began, watchers = time.monotonic(), Watchers(session, watch)
    limit = Limit.of(stop_at, on_stop, stages)
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(parent_folders(out))
            if not dry_run:
                clean_up(out)
            refuse_existing(out, overwrite=overwrite)

        session.processes.from_first(begin)
        if not dry_run:
            stack.enter_context(warmed_up(stages, session))
        planned = plan_run(
            model,
            out,
            stages,
            session,
            shard_bytes=shard_bytes,
            chosen=chosen,
            watchers=watchers,
            limit=limit,
        )
        if dry_run:
            return planned.dry_result()
        written = write_run(planned, watchers, limit, overwrite=overwrite)
    result = _result(written.run, written, time.monotonic() - began)
    watchers.run_done(result)
    return _checked(result, planned, watchers) if check and result.errors else result


def _result(run: PlannedRun, written: WrittenRun, seconds: float) -> Result:
    """The result of ``run``, whose folder is ``written``."""
    reports, share = written.reports, run.decision.share
    return Result(
        out=run.out,
        errors={name: error for report in reports for name, error in report.errors.items()},
        losses={name: loss for report in reports for name, loss in report.losses.items()},
        notes=written.prepared.notes + tuple(note for r in reports for note in r.notes),
        source_bytes=run.what.source_bytes,
        bytes=run.plan.nbytes,
        seconds=seconds,
        resumed=written.resumed,
        stages=run.session.clock.costs(),
        float_share=share.total,
        floats=share.kinds,
        kept_float=run.decision.narrow,
        source_format=run.source.quantized,
        choice=None if run.chosen is None else run.chosen.choice,
        raised=() if run.raising is None else run.raising.raised,
    )


def _checked(result: Result, run: PlannedRun, watchers: Watchers) -> Result:
    """``result`` with its quality, or with a note on why the quality is not known."""
    watchers.stage_begun("checking")
    session, data = run.session, run.stages.recipe.calibration
    try:
        with session.clock("checking"):
            quality = check_quality(result, run.what, run.view, data, run.samples, session)
    except QplugError as error:
        note = f"the quality was not measured: {error}"
        return replace(result, notes=(*result.notes, note))
    return replace(result, quality=quality, stages=session.clock.costs())
