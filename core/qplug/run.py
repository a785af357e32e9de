"""One run, from a checkpoint to a quantized folder: the story on a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qplug.api import Block, Linear, ModelView
from qplug.calibration import Walk
from qplug.checkpoint import Checkpoint
from qplug.errors import QplugError
from qplug.manifest import fingerprint, result_files
from qplug.numerics import check_width
from qplug.output import Content, Output, refuse_existing
from qplug.plan import Plan, make_plan
from qplug.recipe import Calibration, Recipe, assign, parse_algorithms, parse_scheme
from qplug.registry import Registry
from qplug.samples import calibration_tokens
from qplug.scheme import Scheme
from qplug.skeleton import model_view
from qplug.source import find_model
from qplug.stages import Report, Stages

#: Told of each finished step: its number from 1, how many there are, its name, and the mean loss of
#: its linears if it was calibrated.
Watcher = Callable[[int, int, str, "float | None"], None]

#: A finished step: its number, the tensors to write, and the report to leave in the journal.
Finished = tuple[int, Mapping[str, Content], Report]

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Result:
    """What a run did. ``errors`` are ``||W' - W|| / ||W||`` of each quantized linear.

    ``losses`` are the same of what the linears compute on the calibration data, if there is any;
    ``notes`` is what algorithms have to tell.
    """

    out: Path
    errors: Mapping[str, float]
    losses: Mapping[str, float]
    notes: tuple[str, ...]
    source_bytes: int
    bytes: int
    seconds: float
    resumed: int
    dry_run: bool = False


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
    sampling: str = "dataset",
    ignore: Sequence[str] = (),
    overrides: Mapping[str, str | Scheme] | None = None,
    algorithm_options: Mapping[str, Mapping[str, Any]] | None = None,
    backend_options: Mapping[str, Any] | None = None,
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
    through what was made of the block (``propagate="quantized"``) or through the float one.
    ``sampling`` is how windows are cut from its documents: as the dataset has it, or as
    ``qplug.windows.sample`` does. ``overrides`` maps patterns of module names to other schemes.
    Killed and called again, it goes on where it was. Raises QplugError for what the user can mend,
    before the work where that can be known, and leaves nothing behind.
    """
    recipe = Recipe(
        algorithms=parse_algorithms(algo),
        scheme=parse_scheme(scheme, group_size),
        backend=backend,
        overrides=tuple((p, parse_scheme(s)) for p, s in (overrides or {}).items()),
        ignore=tuple(ignore),
        algorithm_options=algorithm_options or {},
        backend_options=backend_options or {},
        calibration=Calibration(
            dataset, dataset_options or {}, samples, seq_len, propagate, sampling
        ),
        seed=seed,
    )
    run = Run(recipe, registry or Registry.installed(), find_device(device), trust_remote_code)
    return run(model, Path(out), shard_bytes, overwrite, dry_run, watch or (lambda *_: None))


class Run:
    """A recipe with its plugins found and their options checked; calling it quantizes a model."""

    def __init__(
        self, recipe: Recipe, registry: Registry, device: torch.device, trust_remote_code: bool
    ) -> None:
        self.stages = Stages(recipe, registry)
        if not self.stages.needs_data:
            recipe = replace(recipe, calibration=None)
        elif recipe.calibration and self.stages.exporter.stores_float:
            # What is stored computes what the float model does, and a run that goes on has no more.
            recipe = replace(recipe, calibration=replace(recipe.calibration, propagate="float"))
        self.recipe, self.registry, self.device = recipe, registry, device
        self.trust_remote_code = trust_remote_code

    def __call__(
        self,
        model: str,
        out: Path,
        shard_bytes: int,
        overwrite: bool,
        dry_run: bool,
        watch: Watcher,
    ) -> Result:
        began = time.monotonic()
        refuse_existing(out, overwrite=overwrite)
        source = Checkpoint.open(find_model(model))
        if source.folder.resolve().is_relative_to(out.resolve()):
            raise QplugError(f"{out}: is or holds the model itself; choose another folder")
        view = model_view(source, trust_remote_code=self.trust_remote_code)
        schemes = self._servable(assign(self.recipe, view), view)
        exporter, calibration = self.stages.exporter, self.recipe.calibration
        by_block = calibration is not None
        coded = {} if exporter.stores_float else schemes
        plan = make_plan(source, view, coded, exporter, shard_bytes=shard_bytes, by_block=by_block)
        source_bytes = sum(tensor.nbytes for tensor in source.tensors.values())
        tokens = self._tokens(calibration, model, view) if calibration else None
        if dry_run:
            return Result(out, {}, {}, (), source_bytes, plan.nbytes, 0.0, 0, dry_run=True)

        mark = fingerprint(
            source, self.recipe, self.registry, self.device.type, shard_bytes, tokens
        )
        with Output(out, plan, mark, overwrite=overwrite) as output:
            reports = {n: Report.from_dict(plain) for n, plain in output.finished.items()}
            if tokens is None or calibration is None:
                work = self._streamed(plan, source, view, output)
            else:
                walk = Walk(
                    source,
                    view,
                    schemes,
                    tokens,
                    device=self.device,
                    propagate=calibration.propagate,
                    trust_remote_code=self.trust_remote_code,
                )
                work = self._calibrated(plan, source, view, walk, output)
            for number, contents, report in work:
                output.write(number, contents, report.to_dict())
                reports[number] = report
                watch(len(reports), len(plan.steps), plan.steps[number].name, report.loss)
            told = [reports[number] for number in range(len(plan.steps))]
            texts = result_files(model, view, self.recipe, exporter, coded, told, self.registry)
            output.finish(source.companions(), texts)
        return Result(
            out=out,
            errors={name: error for report in told for name, error in report.errors.items()},
            losses={name: loss for report in told for name, loss in report.losses.items()},
            notes=tuple(note for report in told for note in report.notes),
            source_bytes=source_bytes,
            bytes=plan.nbytes,
            seconds=time.monotonic() - began,
            resumed=len(output.finished),
        )

    def _servable(self, schemes: dict[str, Scheme], view: ModelView) -> dict[str, Scheme]:
        """The schemes with the backend's dtype of scales. Raises QplugError if it refuses them."""
        for name, scheme in schemes.items():
            try:
                check_width(view.linears[name][1], scheme.weights)
            except QplugError as error:
                raise QplugError(f"{name}: {error}; choose another --group-size") from None
        exporter = self.stages.exporter
        sentence = exporter.refuses(view, schemes)
        if sentence is not None:
            raise QplugError(f"{exporter.name}: {sentence}")
        return {
            name: scheme.with_scale_dtype(exporter.scale_dtype(scheme, view.dtype))
            for name, scheme in schemes.items()
        }

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
        self, plan: Plan, source: Checkpoint, view: ModelView, output: Output
    ) -> Iterator[Finished]:
        """Every step that is left, one tensor at a time; the next is read meanwhile."""

        def read(number: int) -> list[Tensor]:
            return [source.read(f"{name}.weight") for name in plan.steps[number].linears]

        todo = [number for number in range(len(plan.steps)) if number not in output.finished]
        with ThreadPoolExecutor(1, "qplug-reader") as reader:
            coming = reader.submit(read, todo[0]) if todo else None
            for number, after in zip_longest(todo, todo[1:]):
                assert coming is not None
                weights = coming.result()
                coming = reader.submit(read, after) if after is not None else None
                step = plan.steps[number]
                if not weights:
                    yield number, {n: source.tensors[n].chunks() for n in step.others}, Report()
                    continue
                linears = tuple(
                    Linear(name, weight.to(self.device), scheme.weights, scheme.activations)
                    for weight, (name, scheme) in zip(weights, step.linears.items(), strict=True)
                )
                block = Block(step.name, linears)
                codes = self.stages.quantize(block)
                report = self.stages.report(block, codes)
                yield number, self.stages.pack(codes, step, view.dtype), report

    def _calibrated(
        self, plan: Plan, source: Checkpoint, view: ModelView, walk: Walk, output: Output
    ) -> Iterator[Finished]:
        """Every step that is left, one decoder block at a time."""
        for number, step in enumerate(plan.steps):
            if step.name not in view.blocks:
                if number not in output.finished:
                    yield number, {n: source.tensors[n].chunks() for n in step.others}, Report()
                continue
            if number in output.finished:
                walk.replay(step.name, self._served(step.linears, step.others, output, step.name))
                continue
            block = walk.enter(step.name)
            codes = self.stages.quantize(block)
            if self.stages.exporter.stores_float:
                block.clip()
            report = self.stages.report(block, codes, block.rewritten())
            packed = self.stages.pack(codes, step, view.dtype)
            others = block.others(step.others)
            served = block.served(codes, others)
            if not self.stages.exporter.exact:  # what it stores is not quite what the codes say
                served |= self._dequantized(step.linears, packed, step.name)
            walk.leave(step.name, served)
            # Old checkpoints have tensors in their blocks that are no parameters: masks, tables.
            kept = {n: source.tensors[n].chunks() for n in step.others if n not in others}
            yield number, {**packed, **others, **kept}, report

    def _dequantized(
        self, linears: Mapping[str, Scheme], tensors: Mapping[str, Tensor], block: str
    ) -> dict[str, Tensor]:
        """The weights that packed ``tensors`` (by full name) stand for, by name in the block."""
        weights = {}
        for name, scheme in linears.items():
            packed = {
                tensor.rpartition(".")[2]: value
                for tensor, value in tensors.items()
                if tensor.rpartition(".")[0] == name and tensor != f"{name}.bias"
            }
            local = name.removeprefix(f"{block}.")
            weights[f"{local}.weight"] = self.stages.exporter.dequantize(packed, scheme)
        return weights

    def _served(
        self,
        linears: Mapping[str, Scheme],
        others: Sequence[str],
        output: Output,
        block: str,
    ) -> dict[str, Tensor]:
        """What an earlier run wrote of a block, as an engine will compute with it."""
        tensors = {}
        for name in linears:
            stored = output.stored(f"{name}.")
            tensors.update({f"{name}.{local}": tensor for local, tensor in stored.items()})
        served = self._dequantized(linears, tensors, block)
        for name in others:
            path, _, local = name.rpartition(".")
            served[name.removeprefix(f"{block}.")] = output.stored(f"{path}.")[local]
        return served


def find_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device gives no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise QplugError(f"--device {name}: {reason}") from error
    return device
