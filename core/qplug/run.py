"""One run, from a checkpoint to a quantized folder: the story on a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qplug.api import Algorithm, Block, Exporter, Linear, ModelView, QuantizedWeight
from qplug.checkpoint import Checkpoint
from qplug.errors import QplugError, StageError
from qplug.manifest import fingerprint, result_files
from qplug.numerics import check_width, relative_error
from qplug.output import Content, Output, refuse_existing
from qplug.params import fill
from qplug.plan import Plan, Step, make_plan
from qplug.recipe import DEFAULT_QUANTIZER, Recipe, assign, parse_algorithms, parse_scheme
from qplug.registry import Registry
from qplug.scheme import Scheme
from qplug.skeleton import model_view
from qplug.source import find_model

#: Told of each finished step: its number from 1, how many there are, its name, its relative error.
Watcher = Callable[[int, int, str, "float | None"], None]

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Result:
    """What a run did. ``errors`` are ``||W' - W|| / ||W||`` of each quantized linear."""

    out: Path
    errors: Mapping[str, float]
    source_bytes: int
    bytes: int
    seconds: float
    resumed: int
    dry_run: bool = False


def quantize(
    model: str,
    out: str | Path,
    *,
    algo: str = DEFAULT_QUANTIZER,
    scheme: str = "W4A16",
    backend: str = "sglang",
    group_size: int | None = None,
    ignore: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
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

    ``algo`` is one algorithm or several (``"quarot+gptq"``); ``overrides`` maps patterns of module
    names to other schemes. Killed and called again, it goes on where it was. Raises QplugError for
    what the user can mend, before the work where that can be known, and leaves nothing behind.
    """
    recipe = Recipe(
        algorithms=parse_algorithms(algo),
        scheme=parse_scheme(scheme, group_size),
        backend=backend,
        overrides=tuple((p, parse_scheme(s)) for p, s in (overrides or {}).items()),
        ignore=tuple(ignore),
        algorithm_options=algorithm_options or {},
        backend_options=backend_options or {},
        seed=seed,
    )
    run = Run(recipe, registry or Registry.installed(), find_device(device), trust_remote_code)
    return run(model, Path(out), shard_bytes, overwrite, dry_run, watch or (lambda *_: None))


class Run:
    """A recipe with its plugins found and their options checked; calling it quantizes a model."""

    def __init__(
        self, recipe: Recipe, registry: Registry, device: torch.device, trust_remote_code: bool
    ) -> None:
        self.recipe, self.registry, self.device = recipe, registry, device
        self.trust_remote_code = trust_remote_code
        backend = registry.exporters[recipe.backend]
        options: object = fill(backend.Params, recipe.backend_options, f"backend {backend.name}")
        self.exporter: Exporter[Any] = backend(options)
        self.quantizer = self._find_quantizer()

    def _find_quantizer(self) -> Algorithm[Any]:
        recipe, offers = self.recipe, self.registry.algorithms
        for name in recipe.algorithm_options:
            if name not in recipe.algorithms:
                raise QplugError(f"-o {name}...: {name} is not in --algo")
        pipeline = []
        for name in recipe.algorithms:
            algorithm = offers[name]
            options = recipe.algorithm_options.get(name, {})
            pipeline.append(algorithm(fill(algorithm.Params, options, f"algorithm {name}")))
        quantizers = [algorithm for algorithm in pipeline if algorithm.quantizes()]
        if len(quantizers) > 1:
            names = " and ".join(algorithm.name for algorithm in quantizers)
            raise QplugError(f"{names} both choose codes; a pipeline can have one that does")
        if quantizers:
            return quantizers[0]
        default = offers[DEFAULT_QUANTIZER]
        return default(fill(default.Params, {}, f"algorithm {DEFAULT_QUANTIZER}"))

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
        if out.absolute() == source.folder.absolute():
            raise QplugError(f"{out}: is the model itself; choose another folder")
        view = model_view(source, trust_remote_code=self.trust_remote_code)
        schemes = self._servable(assign(self.recipe, view), view)
        plan = make_plan(source, view, schemes, self.exporter, shard_bytes=shard_bytes)
        source_bytes = sum(tensor.nbytes for tensor in source.tensors.values())
        if dry_run:
            return Result(out, {}, source_bytes, plan.nbytes, 0.0, 0, dry_run=True)

        mark = fingerprint(source, self.recipe, self.registry, self.device.type, shard_bytes)
        with Output(out, plan, mark, overwrite=overwrite) as output:
            reports = dict(output.finished)
            for number, weight in self._weights(plan, source, skip=output.finished):
                step = plan.steps[number]
                contents, reports[number] = self._work(step, weight, source, view)
                output.write(number, contents, reports[number])
                watch(len(reports), len(plan.steps), step.name, reports[number].get("error"))
            errors = {
                step.name: reports[number]["error"]
                for number, step in enumerate(plan.steps)
                if step.scheme is not None
            }
            texts = result_files(
                model, view, self.recipe, self.exporter, schemes, errors, self.registry
            )
            output.finish(source.companions(), texts)
        seconds = time.monotonic() - began
        return Result(out, errors, source_bytes, plan.nbytes, seconds, len(output.finished))

    def _servable(self, schemes: dict[str, Scheme], view: ModelView) -> dict[str, Scheme]:
        """The schemes with the backend's dtype of scales. Raises QplugError if it refuses them."""
        for name, scheme in schemes.items():
            try:
                check_width(view.linears[name][1], scheme.weights)
            except QplugError as error:
                raise QplugError(f"{name}: {error}; choose another --group-size") from None
        sentence = self.exporter.refuses(view, schemes)
        if sentence is not None:
            raise QplugError(f"{self.exporter.name}: {sentence}")
        return {
            name: scheme.with_scale_dtype(self.exporter.scale_dtype(scheme, view.dtype))
            for name, scheme in schemes.items()
        }

    def _weights(
        self, plan: Plan, source: Checkpoint, skip: Mapping[int, object]
    ) -> Iterator[tuple[int, Tensor | None]]:
        """The steps still to be done, each with its weight; the next is read meanwhile."""

        def read(number: int) -> Tensor | None:
            step = plan.steps[number]
            return source.read(f"{step.name}.weight") if step.scheme else None

        todo = [number for number in range(len(plan.steps)) if number not in skip]
        with ThreadPoolExecutor(1, "qplug-reader") as reader:
            coming = reader.submit(read, todo[0]) if todo else None
            for number, after in zip(todo, [*todo[1:], None], strict=True):
                assert coming is not None
                weight = coming.result()
                coming = reader.submit(read, after) if after is not None else None
                yield number, weight

    def _work(
        self, step: Step, weight: Tensor | None, source: Checkpoint, view: ModelView
    ) -> tuple[Mapping[str, Content], dict[str, Any]]:
        """What one step writes, and the report it leaves in the journal."""
        if weight is None or step.scheme is None:
            return {step.name: source.tensors[step.name].chunks()}, {}
        weight = weight.to(self.device)
        linear = Linear(step.name, weight, step.scheme.weights)
        with self._blame(self.quantizer, step.name):
            codes = self.quantizer.quantize(Block(step.name, (linear,)))[step.name]
        with self._blame(self.exporter, step.name):
            contents = self._packed(codes, step, step.scheme, view)
        return contents, {"error": float(f"{relative_error(weight, codes):.4g}")}

    def _packed(
        self, codes: QuantizedWeight, step: Step, scheme: Scheme, view: ModelView
    ) -> dict[str, Content]:
        packed = self.exporter.pack(codes, scheme, view.dtype)
        contents: dict[str, Content] = {f"{step.name}.{k}": t.cpu() for k, t in packed.items()}
        found = {name: (str(t.dtype)[6:], tuple(t.shape)) for name, t in contents.items()}  # type: ignore[union-attr]
        planned = {name: (spec.dtype, spec.shape) for name, spec in step.outputs.items()}
        if found != planned:
            raise ValueError(f"pack gave {found}, but layout said {planned}")
        return contents

    @contextmanager
    def _blame(self, component: Algorithm[Any] | Exporter[Any], where: str) -> Iterator[None]:
        """Names the layer in an error, and the plugin too if the error is a bug."""
        try:
            yield
        except QplugError as error:
            raise QplugError(f"{where}: {error}") from error
        except Exception as error:
            plugin = self.registry.blame(error)
            source = plugin.source if plugin else "no plugin"
            raise StageError(component.name, source, where, error) from error


def find_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise QplugError(f"--device {name}: {reason}") from error
    return device
