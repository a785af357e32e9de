"""Plans a run: everything is decided and checked before the first weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qplug.api import Checkpoint, ModelView
from qplug.api.events import RaisedBlock, Result, RunPlan
from qplug.api.scheme import Scheme
from qplug.calibration.samples import Samples
from qplug.calibration.tokens import calibration_tokens
from qplug.machine.session import Session
from qplug.model.kv_cache import KVCache
from qplug.model.skeleton import Skeleton
from qplug.model.tokenizer import import_tokenizers
from qplug.output.manifest import RAISED
from qplug.output.plan import Plan, make_plan
from qplug.run.choose import CHOICE, Chosen
from qplug.run.description import describe
from qplug.run.drafts import open_model
from qplug.run.prepare import Prepared, prepare, with_float_experts_stacked
from qplug.run.raising import Raising
from qplug.run.refuse import Decision, open_source, refuse_unplanned, servable_cache
from qplug.run.stages import Stages
from qplug.run.stop_at import Limit
from qplug.run.watchers import Watchers


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run of which everything is decided, and no weight is read.

    ``source`` is the float model, ``view`` its structure, ``skeleton`` its hollow model.
    ``prepared`` is the model as algorithms rewrite it. ``decision`` says what is quantized, and
    ``coded`` has the schemes of linears that are stored as codes. ``plan`` fixes the position of
    every byte of the result. ``cache`` is None without scales of a KV cache, ``samples`` without
    calibration data, ``chosen`` without ``--scheme auto``, ``raising`` without ``--on-stop raise``.
    ``what`` describes the run to its user.
    """

    model: str
    out: Path
    stages: Stages
    session: Session
    source: Checkpoint
    skeleton: Skeleton
    view: ModelView
    prepared: Prepared
    decision: Decision
    coded: Mapping[str, Scheme]
    cache: KVCache | None
    plan: Plan
    samples: Samples | None
    what: RunPlan
    chosen: Chosen | None
    shard_bytes: int
    raising: Raising | None = None

    @property
    def record_of_choice(self) -> dict[str, Any]:
        """What ``qplug.json`` says of the choice of schemes; empty without one."""
        return {} if self.chosen is None else {CHOICE: self.chosen.to_dict()}

    @property
    def record_of_raised(self) -> dict[str, Any]:
        """What ``qplug.json`` says of raised blocks; empty if none was raised."""
        if self.raising is None or not self.raising.raised:
            return {}
        return {RAISED: self.raising.to_dict()}

    def with_raised(self, raised: Sequence[RaisedBlock]) -> PlannedRun:
        """Returns this run with ``raised`` blocks instead of those that were raised before.

        Every step has the shard that it had, which may grow.
        """
        if self.raising is None or tuple(raised) == self.raising.raised:
            return self
        raising, view = self.raising.with_raised(raised), self.prepared.view
        exporter = self.stages.exporter
        stages = self.stages.with_recipe(raising.recipe(view, exporter.built_float(view)))
        decision = stages.decide(self.source, view)
        plan = _plan(
            self.prepared,
            decision.schemes,
            stages,
            self.cache,
            self.session,
            shard_bytes=self.shard_bytes,
            like=self.plan,
        )
        return replace(
            self,
            stages=stages,
            decision=decision,
            coded=decision.schemes,
            plan=plan,
            raising=raising,
        )

    def learned(self, prepared: Prepared) -> Prepared:
        """Returns ``prepared``, rewritten as was learned, in the layout that the plan stores."""
        return with_float_experts_stacked(prepared, self.coded)

    def dry_result(self) -> Result:
        """Returns the result of a dry run."""
        return Result(
            self.out,
            {},
            {},
            self.prepared.notes,
            self.what.source_bytes,
            self.plan.nbytes,
            0.0,
            0,
            dry_run=True,
            float_share=self.decision.share.total,
            floats=self.decision.share.kinds,
            kept_float=self.decision.narrow,
            source_format=self.source.quantized,
            plan=self.what,
            choice=None if self.chosen is None else self.chosen.choice,
        )


def plan_run(
    model: str,
    out: Path,
    stages: Stages,
    session: Session,
    *,
    shard_bytes: int,
    chosen: Chosen | None,
    watchers: Watchers,
    limit: Limit | None = None,
) -> PlannedRun:
    """Returns the run that quantizes ``model`` into ``out`` by ``stages``, within ``limit``.

    Raises QplugError for all mistakes that can be detected before a weight is read.
    """
    recipe, exporter = stages.recipe, stages.exporter
    watchers.stage_begun("opening")
    source, skeleton = open_source(model, out, exporter, session)
    with session.clock("opening"):
        source, view = open_model(recipe, source, session, skeleton)
        prepared = prepare(stages, source, view, session)  # rewrites apply when a tensor is read
    decision = stages.decide(source, prepared.view)
    cache = servable_cache(recipe.kv_cache, source, prepared.view, exporter, session)
    coded = {} if exporter.format.stores_float else decision.schemes
    prepared = with_float_experts_stacked(prepared, coded)
    plan = _plan(prepared, coded, stages, cache, session, shard_bytes=shard_bytes)
    raising = None
    if limit is not None and limit.raises:
        raising = Raising.of(stages, prepared, coded, session.registry)
    samples = _samples(model, stages, prepared.view, session, watchers)
    return PlannedRun(
        model=model,
        out=out,
        stages=stages,
        session=session,
        source=source,
        skeleton=skeleton,
        view=view,
        prepared=prepared,
        decision=decision,
        coded=coded,
        cache=cache,
        plan=plan,
        samples=samples,
        what=replace(
            describe(model, source, stages, plan, prepared, samples, session),
            stop_at=None if raising is None or limit is None else limit.distance,
            raises_to=() if raising is None else raising.names,
        ),
        chosen=chosen,
        shard_bytes=shard_bytes,
        raising=raising,
    )


def _plan(
    prepared: Prepared,
    coded: Mapping[str, Scheme],
    stages: Stages,
    cache: KVCache | None,
    session: Session,
    *,
    shard_bytes: int,
    like: Plan | None = None,
) -> Plan:
    """The plan that stores the linears ``coded`` as codes; ``like`` as in ``make_plan``."""
    exporter = stages.exporter
    with session.registry.blaming(exporter, "layout"):
        plan = make_plan(
            prepared.checkpoint,
            prepared.view,
            coded,
            exporter,
            shard_bytes=shard_bytes,
            by_block=stages.recipe.calibration is not None,
            cache_scales={b: cache.scale_specs(b) for b in prepared.view.blocks} if cache else {},
            like=like,
        )
    refuse_unplanned(plan, coded, exporter)
    return plan


def _samples(
    model: str, stages: Stages, view: ModelView, session: Session, watchers: Watchers
) -> Samples | None:
    """The calibration samples; None if no algorithm needs data."""
    data = stages.recipe.calibration
    if data is None:
        return None
    watchers.stage_begun("data")
    with session.clock("data"):
        if not session.processes.is_first:
            import_tokenizers()  # as the first process does; it would wait for this one later
        return session.processes.from_first(
            lambda: calibration_tokens(data, model, view, session, seed=stages.recipe.seed)
        )
