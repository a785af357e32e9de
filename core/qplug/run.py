"""One run, from a checkpoint to a quantized folder: the story on a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qplug.announcing import Announcer
from qplug.api import Algorithm, Block, FloatModel, Linear, ModelView
from qplug.architectures import find_view
from qplug.calibration import Walk
from qplug.checkpoint import Checkpoint
from qplug.errors import QplugError
from qplug.events import Result
from qplug.kv_cache import KVCache, find_cache
from qplug.launch import ALONE, Launch
from qplug.manifest import fingerprint, result_files
from qplug.numerics import check_widths
from qplug.output import Content, Output, refuse_existing
from qplug.plan import Plan, Step, make_plan
from qplug.preparation import Prepared, prepare
from qplug.processes import Processes, join
from qplug.qtorch_rounding import require_qtorch
from qplug.ranges import input_ranges
from qplug.recipe import (
    Calibration,
    Recipe,
    assign,
    parse_algorithms,
    parse_cache,
    parse_scheme,
    with_qtorch,
)
from qplug.registry import Registry
from qplug.rewriting import rewritten_names
from qplug.samples import calibration_tokens
from qplug.scheme import Scheme
from qplug.shared_output import SharedOutput
from qplug.source import find_model
from qplug.stages import Report, Stages
from qplug.stopwatch import Stopwatch
from qplug.whole_model import HeldModel

#: Told of each finished step: its number from 1, how many there are, its name, and the mean loss of
#: its linears if it was calibrated.
Watcher = Callable[[int, int, str, "float | None"], None]

#: A finished step: its number, the tensors to write, and the report to leave in the journal.
Finished = tuple[int, Mapping[str, Content], Report]

SHARD_BYTES = 5_000_000_000


def quantize(
    model: str,
    out: str | Path,
    *,
    algo: str = "rtn",
    scheme: str | Scheme = "W4A16",
    backend: str = "sglang",
    group_size: int | None = None,
    dataset: str = "demo",
    dataset_options: Mapping[str, Any] | None = None,
    samples: int = 128,
    seq_len: int = 512,
    propagate: str = "quantized",
    batch_size: int | None = None,
    observer: str = "minmax",
    observer_options: Mapping[str, Any] | None = None,
    kv_cache: str | None = None,
    sampling: str = "dataset",
    ignore: Sequence[str] = (),
    overrides: Mapping[str, str | Scheme] | None = None,
    algorithm_options: Mapping[str, Mapping[str, Any]] | None = None,
    backend_options: Mapping[str, Any] | None = None,
    use_qtorch: bool = False,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    watch: Watcher | None = None,
) -> Result:
    """Quantize ``model`` (a folder, a Hub id, or ``qplug:demo``) into the new folder ``out``.

    ``algo`` is one algorithm or several (``"awq+gptq"``). Those that need data are given
    ``samples`` windows of ``seq_len`` tokens of ``dataset``; block by block, the tokens go on
    through what was made of the block (``propagate="quantized"``) or through the float one. So do
    schemes with static inputs, whose ranges ``observer`` finds (``minmax``, ``moving-average`` or
    ``histogram``), and ``kv_cache="fp8"``, which stores the scales of keys and values.
    ``sampling`` is how windows are cut from its documents: as the dataset has it, or as
    ``qplug.windows.sample`` does. ``overrides`` maps patterns of module names to other schemes.
    ``use_qtorch`` has the package qtorch round to float formats, for a backend that only measures.
    Killed and called again, it goes on where it was. Raises QplugError for what the user can mend,
    before the work where that can be known, and leaves nothing behind. Called in each process that
    torchrun starts, all share the work of a calibrated run; the first one writes.
    """
    launch = Launch.of()
    recipe = Recipe(
        algorithms=parse_algorithms(algo),
        scheme=parse_scheme(scheme, group_size),
        backend=backend,
        overrides=tuple((p, parse_scheme(s)) for p, s in (overrides or {}).items()),
        ignore=tuple(ignore),
        algorithm_options=algorithm_options or {},
        backend_options=backend_options or {},
        calibration=Calibration(
            dataset,
            dataset_options or {},
            samples,
            seq_len,
            propagate,
            observer,
            observer_options or {},
            batch_size,
            sampling,
        ),
        kv_cache=parse_cache(kv_cache),
        seed=seed,
    )
    if use_qtorch:
        recipe = with_qtorch(recipe)
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
        source = Checkpoint.open(processes.from_first(lambda: find_model(model)))
        if source.folder.resolve().is_relative_to(out.resolve()):
            raise QplugError(f"{out}: is or holds the model itself; choose another folder")
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
        sentence = self.stages.exporter.refuses_files(source.folder)
        if sentence is not None:
            raise QplugError(f"{self.stages.exporter.name}: {sentence}")
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
            work: Iterable[Finished] = ()
            if tokens is None or calibration is None:
                # No step needs another, and most of the time goes into files.
                if processes.is_first:
                    work = self._streamed(plan, prepared.checkpoint, view, done, announcer)
            else:
                # Whoever keeps this frame, in a traceback, keeps no hidden states.
                work = self._calibrated(
                    plan,
                    prepared.checkpoint,
                    view,
                    self._walk(prepared, schemes, tokens, calibration, cache, processes),
                    output,
                    done,
                    announcer,
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

    def _streamed(
        self,
        plan: Plan,
        source: Checkpoint,
        view: ModelView,
        done: Collection[int],
        announcer: Announcer,
    ) -> Iterator[Finished]:
        """Every step that is left, one tensor at a time; the next is read meanwhile."""

        def read(number: int) -> list[Tensor]:
            return [source.read(f"{name}.weight") for name in plan.steps[number].linears]

        todo = [number for number in range(len(plan.steps)) if number not in done]
        with ThreadPoolExecutor(1, "qplug-reader") as reader:
            coming = reader.submit(read, todo[0]) if todo else None
            for number, after in zip_longest(todo, todo[1:]):
                assert coming is not None
                with self.clock("reading"):
                    weights = coming.result()
                coming = reader.submit(read, after) if after is not None else None
                step = plan.steps[number]
                if not weights:
                    yield self._copied(number, step, source, announcer)
                    continue
                linears = tuple(
                    Linear(name, weight.to(self.device), scheme.weights, scheme.activations)
                    for weight, (name, scheme) in zip(weights, step.linears.items(), strict=True)
                )
                block = Block(step.name, linears)
                codes = self.stages.quantize(block)
                report = self.stages.report(block, codes, self._rewritten(step, source))
                announcer.block_done(step.name, report, block, codes)
                yield number, self.stages.pack(codes, step, view.dtype), report

    def _apart(
        self, number: int, step: Step, source: Checkpoint, dtype: str, announcer: Announcer
    ) -> Finished:
        """A step of a calibrated run that is no decoder block: a tensor to copy, or a head."""
        if not step.linears:
            return self._copied(number, step, source, announcer)
        linears = tuple(
            Linear(name, source.read(f"{name}.weight").to(self.device), s.weights, s.activations)
            for name, s in step.linears.items()
        )
        block = Block(step.name, linears)
        codes = self.stages.quantize_apart(block)
        report = self.stages.report(block, codes, self._rewritten(step, source))
        announcer.block_done(step.name, report, block, codes)
        return number, self.stages.pack(codes, step, dtype), report

    def _copied(
        self, number: int, step: Step, source: Checkpoint, announcer: Announcer
    ) -> Finished:
        """A step that has nothing to quantize."""
        contents = {name: source.tensors[name].chunks() for name in step.others}
        report = Report(rewritten=self._rewritten(step, source))
        announcer.block_done(step.name, report)
        return number, contents, report

    def _rewritten(self, step: Step, source: Checkpoint) -> tuple[str, ...]:
        """The tensors of a step that the float model does not hold as they are."""
        names = [*(f"{name}.weight" for name in step.linears), *step.others]
        return rewritten_names(source, names)

    def _calibrated(
        self,
        plan: Plan,
        source: Checkpoint,
        view: ModelView,
        walk: Walk,
        output: SharedOutput,
        done: Collection[int],
        announcer: Announcer,
    ) -> Iterator[Finished]:
        """Every step that is left, one decoder block at a time."""
        for number, step in enumerate(plan.steps):
            if step.name not in view.blocks:
                if number not in done:
                    yield self._apart(number, step, source, view.dtype, announcer)
                continue
            if number in done:
                walk.replay(step.name, self._served(step, output))
                continue
            with self.clock("statistics"):
                block = walk.enter(step.name)
            inputs = input_ranges(block)
            codes = self.stages.quantize(block)
            if self.stages.exporter.stores_float:
                block.clip()
            changed = {*block.rewritten(), *self._rewritten(step, source)}
            report = self.stages.report(block, codes, tuple(sorted(changed)), inputs)
            packed = self.stages.pack(codes, step, view.dtype)
            others = block.others(step.others)
            served = block.served(codes, others, walk.dtype)
            announcer.block_done(step.name, report, block, codes)
            del block, codes  # on a GPU, the larger part of what it holds
            if not self.stages.exporter.exact:  # what it stores is not quite what the codes say
                served |= self._dequantized(step.linears, packed, step.name)
            with self.clock("passing on"):
                scales = walk.cache_scales(step.name, served)
                walk.leave(step.name, served | scales)
            del served
            # Old checkpoints have tensors in their blocks that are no parameters: masks, tables.
            kept = {n: source.tensors[n].chunks() for n in step.others if n not in others}
            cached = {f"{step.name}.{local}": scale for local, scale in scales.items()}
            yield number, {**packed, **others, **kept, **cached}, report

    def _dequantized(
        self, linears: Mapping[str, Scheme], tensors: Mapping[str, Tensor], block: str
    ) -> dict[str, Tensor]:
        """The weights that packed ``tensors`` (by full name) stand for, by name in the block.

        Beside them the scales of static inputs.
        """
        weights = {}
        for name, scheme in linears.items():
            packed = {
                tensor.rpartition(".")[2]: value
                for tensor, value in tensors.items()
                if tensor.rpartition(".")[0] == name and tensor != f"{name}.bias"
            }
            local = name.removeprefix(f"{block}.")
            weights[f"{local}.weight"] = self.stages.exporter.dequantize(packed, scheme)
            scale = self.stages.exporter.input_scale(packed)
            if scale is not None:
                weights[f"{local}.input_scale"] = scale
        return weights

    def _served(self, step: Step, output: SharedOutput) -> dict[str, Tensor]:
        """What an earlier run wrote of a block, as an engine will compute with it."""
        kept = (*step.others, *step.cache_scales)
        modules = dict.fromkeys([*step.linears, *(name.rpartition(".")[0] for name in kept)])
        stored = output.stored([f"{name}." for name in modules])
        tensors = {
            f"{name}.{local}": tensor
            for name in step.linears
            for local, tensor in stored[f"{name}."].items()
        }
        served = self._dequantized(step.linears, tensors, step.name)
        for name in kept:
            path, _, local = name.rpartition(".")
            served[name.removeprefix(f"{step.name}.")] = stored[f"{path}."][local]
        return served


def find_device(name: str, launch: Launch = ALONE) -> torch.device:
    """The device called ``name``; ``auto`` is a GPU if there is one.

    Of several processes each takes a GPU of its own. Raises QplugError if there is none for it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if launch.count > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise QplugError(f"--device {name}: several processes take a GPU each; say cuda")
        if torch.cuda.device_count() < launch.local_count:
            raise QplugError(
                f"{launch.local_count} processes need a GPU each, and {torch.cuda.device_count()} "
                "can be seen; start fewer, or say --device cpu"
            )
        name = f"cuda:{launch.local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device gives no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise QplugError(f"--device {name}: {reason}") from error
    return device
