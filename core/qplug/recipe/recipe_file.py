"""The native recipe: its schema, and its way to a job and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast

import yaml

from qplug.api.scheme import PRESETS, QuantArgs, Scheme, Strategy, preset
from qplug.errors import QplugError
from qplug.recipe.fields import Doc, json_schema, plain, read
from qplug.recipe.job import Export, Job, Measurement, Stage
from qplug.recipe.recipe import Calibration, parse_algorithms
from qplug.recipe.spelled_scheme import spelled
from qplug.recipe.yaml_tree import Node

Options: TypeAlias = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class ArgsPart:
    dtype: Annotated[str, Doc("int2 to int8, or e4m3, e5m2 and the like.")]
    strategy: Annotated[Strategy, Doc("What shares a scale.")]
    group_size: Annotated[int | None, Doc("Columns of a row, for the strategy group.")] = None
    block: Annotated[tuple[int, ...] | None, Doc("Rows and columns, for block.")] = None
    symmetric: Annotated[bool, Doc("No zero point.")] = True
    dynamic: Annotated[bool, Doc("Scales that the engine finds as it runs.")] = False

    def args(self) -> QuantArgs:
        block = None if self.block is None else (self.block[0], self.block[-1])
        return QuantArgs(
            self.dtype, self.strategy, self.group_size, block, self.symmetric, self.dynamic
        )

    @classmethod
    def of(cls, args: QuantArgs) -> ArgsPart:
        return cls(
            args.dtype, args.strategy, args.group_size, args.block, args.symmetric, args.dynamic
        )


@dataclass(frozen=True)
class SchemePart:
    """Either ``preset``, with another ``group_size`` if need be, or ``weights`` spelled out."""

    preset: Annotated[str | None, Doc("A scheme's name: see qplug schemes.")] = None
    group_size: Annotated[int | None, Doc("Of the preset; -1 is a whole row.")] = None
    weights: Annotated[ArgsPart | None, Doc("How weights are stored.")] = None
    activations: Annotated[ArgsPart | None, Doc("How inputs are rounded, if they are.")] = None

    def scheme(self) -> Scheme:
        if (self.preset is None) == (self.weights is None):
            raise QplugError("say preset, or weights")
        if self.preset is not None:
            if self.activations is not None:
                raise QplugError("a preset says itself what becomes of activations")
            found = preset(self.preset)
            return found if self.group_size is None else found.with_group_size(self.group_size)
        assert self.weights is not None
        if self.group_size is not None:
            raise QplugError("group_size belongs into weights")
        return spelled(self.weights.args(), self.activations.args() if self.activations else None)


@dataclass(frozen=True)
class StepPart:
    algorithm: Annotated[str, Doc("See qplug plugins list.")]
    options: Annotated[Options, Doc("See qplug plugins show ALGORITHM.")] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class OverridePart:
    pattern: Annotated[str, Doc("A glob over module names, or re: and an expression.")]
    scheme: Annotated[str | SchemePart, Doc("What these layers get.")]


@dataclass(frozen=True)
class CalibrationPart:
    dataset: Annotated[str, Doc("A dataset plugin.")] = "demo"
    options: Annotated[Options, Doc("See qplug plugins show DATASET.")] = field(
        default_factory=dict
    )
    samples: Annotated[int, Doc("Windows of text.")] = 128
    seq_len: Annotated[int, Doc("Tokens in a window.")] = 512
    sampling: Annotated[
        Literal["dataset", "windows", "documents", "leading", "packed"],
        Doc(
            "How windows are cut: as the dataset has it; anywhere in the joined text; anywhere in "
            "a document; from a document's start; from short documents one after another."
        ),
    ] = "dataset"
    propagate: Annotated[
        Literal["quantized", "float"],
        Doc("What feeds a block: the blocks before it as they became, or as they were."),
    ] = "quantized"


@dataclass(frozen=True)
class ExportPart:
    out: Annotated[Path, Doc("A new folder.")]
    backend: Annotated[str, Doc("Who shall serve it; hf writes transformed float weights.")] = (
        "sglang"
    )
    options: Annotated[Options, Doc("See qplug plugins show BACKEND.")] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class EvalPart:
    at: Annotated[tuple[Stage, ...], Doc("When the model is measured.")]
    dataset: Annotated[str, Doc("A dataset plugin.")] = "demo"
    options: Annotated[Options, Doc("See qplug plugins show DATASET.")] = field(
        default_factory=dict
    )
    seq_len: Annotated[int, Doc("Tokens in a window.")] = 512
    windows: Annotated[int | None, Doc("The first so many; none is all of the text.")] = None


@dataclass(frozen=True)
class RecipeFile:
    """A whole file."""

    model: Annotated[str | None, Doc("A folder, a Hub id, or qplug:demo.")] = None
    pipeline: Annotated[
        tuple[str | StepPart, ...], Doc("Algorithms in order; one at most chooses codes.")
    ] = ("rtn",)
    scheme: Annotated[str | SchemePart, Doc("How layers are stored.")] = "W4A16"
    overrides: Annotated[
        tuple[OverridePart, ...], Doc("Other schemes for some layers; the last that fits counts.")
    ] = ()
    ignore: Annotated[tuple[str, ...], Doc("Patterns of layers that stay float.")] = ()
    calibration: Annotated[CalibrationPart, Doc("The data that algorithms see.")] = field(
        default_factory=CalibrationPart
    )
    observer: Annotated[
        Literal["minmax", "moving-average", "histogram"],
        Doc("How the ranges of static inputs are found."),
    ] = "minmax"
    kv_cache: Annotated[str | None, Doc("fp8 stores scales for such a cache.")] = None
    use_qtorch: Annotated[bool, Doc("Round floats of other formats as qtorch does.")] = False
    seed: Annotated[int, Doc("Of all that is drawn.")] = 0
    export: Annotated[tuple[ExportPart, ...], Doc("The folders to write.")] = ()
    eval: Annotated[tuple[EvalPart, ...], Doc("Perplexities to measure.")] = ()


def schema() -> dict[str, Any]:
    """The JSON Schema of a native recipe."""
    return json_schema(RecipeFile, "qplug recipe")


# --- from a file ----------------------------------------------------------------------------------


def read_recipe(root: Node) -> Job:
    """The job that a native recipe asks for. Raises QplugError, with the line."""
    told = read(RecipeFile, root)
    top = root.entries()

    def scheme_at(part: str | SchemePart, node: Node | None) -> Scheme:
        try:
            return preset(part) if isinstance(part, str) else part.scheme()
        except QplugError as error:
            raise node.place.error(str(error)) if node else error from error

    steps = [StepPart(step) if isinstance(step, str) else step for step in told.pipeline]
    try:
        algorithms = parse_algorithms("+".join(step.algorithm for step in steps))
    except QplugError as error:
        raise top["pipeline"].place.error(str(error)) from error
    patterns = top["overrides"].items() if "overrides" in top else ()
    overrides = tuple(
        (part.pattern, scheme_at(part.scheme, node))
        for part, node in zip(told.overrides, patterns, strict=True)
    )
    calibration = told.calibration
    try:
        data = Calibration(
            calibration.dataset,
            calibration.options,
            calibration.samples,
            calibration.seq_len,
            calibration.propagate,
            sampling=calibration.sampling,
        )
    except QplugError as error:
        raise top["calibration"].place.error(str(error)) from error
    return Job(
        model=told.model,
        algorithms=algorithms,
        algorithm_options={step.algorithm: step.options for step in steps if step.options},
        scheme=scheme_at(told.scheme, top.get("scheme")),
        overrides=overrides,
        ignore=told.ignore,
        calibration=data,
        observer=told.observer,
        kv_cache=told.kv_cache,
        use_qtorch=told.use_qtorch,
        seed=told.seed,
        exports=tuple(Export(part.out, part.backend, part.options) for part in told.export),
        measurements=tuple(
            Measurement(part.at, part.dataset, part.options, part.seq_len, part.windows)
            for part in told.eval
        ),
        places=_places(top),
    )


def _places(top: Mapping[str, Node]) -> dict[str, str]:
    """Where each part stands that plugins have a say in."""
    places = {"algorithms": str(top["pipeline"].place)} if "pipeline" in top else {}
    for step in top["pipeline"].items() if "pipeline" in top else ():
        name = step.value["algorithm"].value if isinstance(step.value, dict) else step.value
        places[f"algorithms.{name}"] = str(step.place)
    if "calibration" in top:
        places["calibration"] = str(top["calibration"].place)
    for key, part in (("export", "exports"), ("eval", "measurements")):
        for number, node in enumerate(top[key].items() if key in top else ()):
            places[f"{part}.{number}"] = str(node.place)
    return places


# --- to a file ------------------------------------------------------------------------------------


def write_recipe(job: Job) -> str:
    """The native recipe of ``job``, as YAML; what has its default is not said."""
    told = plain(
        RecipeFile(
            model=job.model,
            pipeline=tuple(_step(name, job.algorithm_options) for name in job.algorithms),
            scheme=_scheme_part(job.scheme),
            overrides=tuple(OverridePart(p, _scheme_part(s)) for p, s in job.overrides),
            ignore=job.ignore,
            calibration=_calibration_part(job.calibration),
            observer=cast("Any", job.observer),
            kv_cache=job.kv_cache,
            use_qtorch=job.use_qtorch,
            seed=job.seed,
            export=tuple(ExportPart(e.out, e.backend, _options(e.options)) for e in job.exports),
            eval=tuple(
                EvalPart(m.at, m.dataset, _options(m.options), m.seq_len, m.windows)
                for m in job.measurements
            ),
        )
    )
    # What decides most is said even if it is what would be done anyway.
    told = {"pipeline": plain(("rtn",)), "scheme": "W4A16", **told}
    order = [name for name in schema()["properties"] if name in told]
    return yaml.safe_dump({name: told[name] for name in order}, sort_keys=False, allow_unicode=True)


def _step(name: str, options: Mapping[str, Mapping[str, Any]]) -> str | StepPart:
    return StepPart(name, _options(options[name])) if options.get(name) else name


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


def _scheme_part(scheme: Scheme) -> str | SchemePart:
    named = PRESETS.get(scheme.name)
    if named is None:
        try:
            named = preset(scheme.name)
        except QplugError:
            named = None
    if named == scheme:
        return scheme.name
    size = scheme.weights.group_size or -1
    try:
        if named is not None and named.with_group_size(size) == scheme:
            return SchemePart(preset=scheme.name, group_size=size)
    except QplugError:
        pass  # it has no groups to choose
    inputs = scheme.activations
    return SchemePart(
        weights=ArgsPart.of(scheme.weights),
        activations=None if inputs is None else ArgsPart.of(inputs),
    )


def _calibration_part(told: Calibration) -> CalibrationPart:
    return CalibrationPart(
        dataset=told.dataset,
        options=_options(told.options),
        samples=told.samples,
        seq_len=told.seq_len,
        sampling=cast("Any", told.sampling),
        propagate=cast("Any", told.propagate),
    )
