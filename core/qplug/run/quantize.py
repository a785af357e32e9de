"""One run, from a checkpoint to a quantized folder: the story on a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qplug.api import Algorithm, FloatModel, ModelView
from qplug.api.events import Result
from qplug.api.scheme import Scheme
from qplug.api.tensors import Checkpoint
from qplug.calibration.tokens import calibration_tokens
from qplug.calibration.walk import Walk
from qplug.calibration.whole_model import HeldModel
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.errors import QplugError
from qplug.machine.devices import find_device
from qplug.machine.launch import Launch
from qplug.machine.processes import Processes, join
from qplug.machine.stopwatch import Stopwatch
from qplug.model.architectures import find_view
from qplug.model.kv_cache import KVCache, find_cache
from qplug.numerics.qtorch import require_qtorch
from qplug.numerics.scales import check_widths
from qplug.output.fingerprint import fingerprint
from qplug.output.plan import make_plan
from qplug.output.result_files import result_files
from qplug.output.shared_writer import SharedOutput
from qplug.output.step_report import Report
from qplug.output.writer import Output, refuse_existing
from qplug.recipe.assign import assign
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.words import RecipeWords, changed
from qplug.registry.registry import Registry
from qplug.run.prepare import Prepared, prepare
from qplug.run.stages import Stages
from qplug.run.steps import Finished, Steps
from qplug.run.watchers import Announcer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import Unpack

#: Told of each finished step: its number from 1, how many there are, its name, and the mean loss of
#: its linears if it was calibrated.
Watcher = Callable[[int, int, str, "float | None"], None]

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
    registry: Registry | None = None,
    watch: Watcher | None = None,
    **words: Unpack[RecipeWords],
) -> Result:
    """Quantize ``model`` (a folder, a Hub id, or ``qplug:demo``) into the new folder ``out``.

    ``recipe`` says how, and ``words`` change it: see ``RecipeWords``. ``algo`` is one algorithm or
    several (``"awq+gptq"``). Algorithms that need data are given ``samples`` windows of ``seq_len``
    tokens of ``dataset``; block by block, the tokens go on through the quantized block
    (``propagate="quantized"``) or through the float one. The ranges of static inputs, which
    ``observer`` finds, and the scales of ``kv_cache="fp8"`` need data too.

    A run that was killed goes on when it is called again. Raises QplugError for what the user can
    mend, before the work where that can be known, and leaves nothing behind. Called in each process
    that torchrun starts, all share the work of a calibrated run; the first one writes.
    """
    launch = Launch.of()
    recipe = changed(recipe or Recipe(), words)
    recipe.check()
    found = find_device(device, launch)
    run = Run(recipe, registry or Registry.installed(), found, trust_remote_code, launch)
    return run(model, Path(out), shard_bytes, overwrite, dry_run, watch or (lambda *_: None))


class Run:
    """A recipe with its plugins found and their options checked; calling it quantizes a model."""

    def __init__(
        self,
        recipe: Recipe,
        registry: Registry,
        device: torch.device,
        trust_remote_code: bool,
        launch: Launch,
    ) -> None:
        self.clock = Stopwatch(device)
        self.stages = Stages(recipe, registry, self.clock)
        if not self.stages.needs_data:
            recipe = replace(recipe, calibration=None)
        elif recipe.calibration and self.stages.exporter.stores_float:
            # What is stored computes what the float model does, and a run that goes on has no more.
            recipe = replace(recipe, calibration=replace(recipe.calibration, propagate="float"))
        self.recipe, self.registry, self.device = recipe, registry, device
        self.trust_remote_code, self.launch = trust_remote_code, launch

    def __call__(
        self,
        model: str,
        out: Path,
        shard_bytes: int,
        overwrite: bool,
        dry_run: bool,
        watch: Watcher,
    ) -> Result:
        with join(self.launch, self.device) as processes:
            return self._run(processes, model, out, shard_bytes, overwrite, dry_run, watch)

    def _run(
        self,
        processes: Processes,
        model: str,
        out: Path,
        shard_bytes: int,
        overwrite: bool,
        dry_run: bool,
        watch: Watcher,
    ) -> Result:
        began = time.monotonic()
        refuse_existing(out, overwrite=overwrite)
        source = self._opened(processes.from_first(lambda: find_model(model)), out)
        with self.clock("opening"):
            view = find_view(source, self.registry, trust_remote_code=self.trust_remote_code)
            rewrite = partial(
                prepare,
                self.stages,
                source,
                view,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            )
            prepared = rewrite()
        view = prepared.view
        schemes = self._servable(assign(self.recipe, view), view)
        exporter, calibration = self.stages.exporter, self.recipe.calibration
        cache = self._cache(source, view)
        coded = {} if exporter.stores_float else schemes
        plan = make_plan(
            prepared.checkpoint,
            view,
            coded,
            exporter,
            shard_bytes=shard_bytes,
            by_block=calibration is not None,
            cache_scales={b: cache.scale_names(b) for b in view.blocks} if cache else {},
        )
        source_bytes = sum(tensor.nbytes for tensor in source.tensors.values())
        tokens = None
        if calibration is not None:
            with self.clock("data"):
                tokens = processes.from_first(lambda: self._tokens(calibration, model, view))
        if dry_run:
            return Result(out, {}, {}, (), source_bytes, plan.nbytes, 0.0, 0, dry_run=True)

        mark = fingerprint(
            source,
            self.recipe,
            self.registry,
            self.device.type,
            shard_bytes,
            tokens,
            processes.count,
        )
        spare = plan.nbytes if exporter.file else 0  # both forms are there for a moment
        with SharedOutput(
            processes, lambda: Output(out, plan, mark, overwrite=overwrite, spare=spare)
        ) as output:
            done = output.finished()
            if tokens is not None and self.stages.learns_whole:
                prepared = rewrite(learn=partial(self._learned, output, tokens, schemes))
            reports = {n: Report.from_dict(plain) for n, plain in done.items()}
            announcer = Announcer(
                self.registry, len(plan.steps), len(done), silent=not processes.is_first
            )
            steps = Steps(
                self.stages,
                plan,
                prepared.checkpoint,
                view,
                self.device,
                announcer,
                self.clock,
            )
            work: Iterable[Finished] = ()
            if tokens is None or calibration is None:
                # No step needs another, and most of the time goes into files.
                if processes.is_first:
                    work = steps.streamed(done)
            else:
                # Whoever keeps this frame, in a traceback, keeps no hidden states.
                work = steps.calibrated(
                    self._walk(prepared, schemes, tokens, calibration, cache, processes),
                    output,
                    done,
                )
            for number, contents, report in work:
                with self.clock("writing"):
                    output.write(number, contents, report.to_dict())
                reports[number] = report
                if processes.is_first:
                    watch(len(reports), len(plan.steps), plan.steps[number].name, report.loss)
            reports = processes.from_first(lambda: reports)
            told = [reports[number] for number in range(len(plan.steps))]
            texts = result_files(
                model,
                view,
                self.recipe,
                exporter,
                coded,
                told,
                self.registry,
                online=prepared.online,
                notes=prepared.notes,
            )
            with self.clock("writing"):
                output.finish(
                    source.companions(),
                    texts,
                    lambda folder: self.stages.convert(folder, view, coded),
                )
        result = Result(
            out=out,
            errors={name: error for report in told for name, error in report.errors.items()},
            losses={name: loss for report in told for name, loss in report.losses.items()},
            notes=prepared.notes + tuple(note for report in told for note in report.notes),
            source_bytes=source_bytes,
            bytes=plan.nbytes,
            seconds=time.monotonic() - began,
            resumed=len(done),
            stages=self.clock.costs(),
        )
        announcer.run_done(result)
        return result

    def _opened(self, model: Path, out: Path) -> Checkpoint:
        """The checkpoint in ``model``. Raises QplugError if ``out`` or the backend refuses it."""
        source = open_checkpoint(model)
        if source.folder.resolve().is_relative_to(out.resolve()):
            raise QplugError(f"{out}: is or holds the model itself; choose another folder")
        sentence = self.stages.exporter.refuses_files(source.folder)
        if sentence is not None:
            raise QplugError(f"{self.stages.exporter.name}: {sentence}")
        return source

    def _walk(
        self,
        prepared: Prepared,
        schemes: Mapping[str, Scheme],
        tokens: Tensor,
        calibration: Calibration,
        cache: KVCache | None,
        processes: Processes,
    ) -> Walk:
        with self.clock("embedding"):
            return Walk(
                prepared.checkpoint,
                prepared.view,
                schemes,
                tokens,
                device=self.device,
                propagate=calibration.propagate,
                batch_size=calibration.batch_size,
                with_drift=self.stages.needs_drift,
                with_targets=self.stages.learns,
                online=prepared.online,
                cache=cache,
                trust_remote_code=self.trust_remote_code,
                processes=processes,
                clock=self.clock,
            )

    def _learned(
        self,
        output: SharedOutput,
        tokens: Tensor,
        schemes: Mapping[str, Scheme],
        algorithm: Algorithm[Any],
        model: FloatModel,
        source: Checkpoint,
    ) -> Mapping[str, Tensor]:
        """What ``algorithm`` learned on the whole of ``source``, now or in an earlier run."""
        calibration = self.recipe.calibration

        def learn() -> Mapping[str, Tensor]:
            whole = HeldModel(
                source,
                model.view,
                schemes,
                tokens,
                device=self.device,
                batch_size=calibration.batch_size if calibration else None,
                trust_remote_code=self.trust_remote_code,
            )
            return self.stages.learn(algorithm, model, whole)

        return output.kept(algorithm.name, learn)

    def _servable(self, schemes: dict[str, Scheme], view: ModelView) -> dict[str, Scheme]:
        """The schemes with the backend's dtype of scales. Raises QplugError if it refuses them."""
        for name, scheme in schemes.items():
            check_widths(name, view.linears[name][1], scheme)
        exporter = self.stages.exporter
        if any(scheme.uses_qtorch for scheme in schemes.values()):
            if exporter.served and not exporter.stores_float:
                raise QplugError(
                    f"{exporter.name}: use_qtorch: engines do not round as qtorch does; "
                    "measure it with --backend fake"
                )
            require_qtorch()
        sentence = exporter.refuses(view, schemes)
        if sentence is not None:
            raise QplugError(f"{exporter.name}: {sentence}")
        return {
            name: scheme.with_scale_dtype(exporter.scale_dtype(scheme, view.dtype))
            for name, scheme in schemes.items()
        }

    def _cache(self, source: Checkpoint, view: ModelView) -> KVCache | None:
        """Who fills the KV cache, if its scales are to be stored. Raises QplugError if refused."""
        args, exporter = self.recipe.kv_cache, self.stages.exporter
        if args is None:
            return None
        sentence = exporter.refuses_cache(args)
        if sentence is not None:
            raise QplugError(f"--kv-cache: {exporter.name}: {sentence}")
        return find_cache(source, view, args, trust_remote_code=self.trust_remote_code)

    def _tokens(self, calibration: Calibration, model: str, view: ModelView) -> Tensor:
        """The calibration tokens, int64 ``[samples, length]``."""
        return calibration_tokens(
            calibration,
            model,
            view,
            seed=self.recipe.seed,
            registry=self.registry,
            trust_remote_code=self.trust_remote_code,
        )
