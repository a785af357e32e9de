"""What a run shall do, as data. The fields of ``Recipe`` are its options, keys and records.

From these fields come the options of ``qplug quantize``, the keywords of ``qplug.quantize``, the
keys of recipe files, ``recipe`` in ``qplug.json``, the rows of the report and the reference page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from qplug.api.params import Param, Spelling, check_fields
from qplug.api.scheme import QuantArgs, Scheme, preset
from qplug.errors import QplugError
from qplug.recipe.fields import all_fields, from_dict
from qplug.recipe.spellings import CACHE, OVERRIDES, PIPELINE, SCHEME, Options

#: Who quantizes where no algorithm of the pipeline does.
DEFAULT_QUANTIZER = "rtn"

#: How windows are cut from the documents of a dataset: see ``qplug.text``.
Sampling: TypeAlias = Literal["dataset", "windows", "documents", "leading", "packed"]
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)

#: What feeds a block in calibration.
Propagation: TypeAlias = Literal["quantized", "float"]

#: The names of observers, which find the ranges of static inputs.
ObserverName: TypeAlias = Literal["minmax", "moving-average", "histogram"]

#: When a model is measured: as it came, after all transforms, and quantized.
Stage: TypeAlias = Literal["pretrain", "transformed", "quantized"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Calibration:
    """The data of a run, and what is made of it. Raises QplugError for a value out of bounds."""

    dataset: Annotated[str, Param("What to calibrate on: a dataset plugin.")] = "demo"
    options: Annotated[
        Options,
        Param(
            "Options of the dataset: see qplug plugins show DATASET.",
            word="dataset_options",
            flag="--dataset-opt",
            of="dataset",
        ),
    ] = field(default_factory=dict)
    samples: Annotated[int, Param("Windows of text.", min=1)] = 128
    seq_len: Annotated[int, Param("Tokens in a window.", min=1)] = 512
    propagate: Annotated[
        Propagation,
        Param("What feeds a block: the blocks before it as they became, or as they were."),
    ] = "quantized"
    observer: Annotated[ObserverName, Param("How the ranges of static inputs are found.")] = (
        "minmax"
    )
    observer_options: Annotated[
        Options, Param("Options of the observer.", flag="--observer-opt", of="observer")
    ] = field(default_factory=dict)
    batch_size: Annotated[
        int | None, Param("Samples in one forward pass; by default as many as fit.", min=1)
    ] = None
    sampling: Annotated[
        Sampling,
        Param(
            "How windows are cut: as the dataset has it; anywhere in the joined text; anywhere in "
            "a document; from a document's start; from short documents one after another.",
            of="dataset",
        ),
    ] = "dataset"

    def __post_init__(self) -> None:
        check_fields(self)


CALIBRATION = Spelling(
    Calibration,
    read=lambda part: {"calibration": part},
    write=lambda recipe: recipe.calibration or Calibration(),
    parse=lambda part: part,
)


@dataclass(frozen=True)
class Recipe:
    """A pipeline of algorithms, a scheme with its exceptions, and a backend.

    ``calibration`` is None in the record of a run that needed no data.
    """

    algorithms: Annotated[
        tuple[str, ...],
        Param(
            "An algorithm, or A+B in order; at most one chooses codes.",
            key="pipeline",
            spelling=PIPELINE,
            word="algo",
            heading="Recipe",
        ),
    ] = ("rtn",)
    scheme: Annotated[
        Scheme,
        Param("How layers are stored: see qplug schemes.", spelling=SCHEME, heading="Recipe"),
    ] = field(default_factory=lambda: preset("W4A16"))
    backend: Annotated[str, Param("Engine or format to export for.", heading="Result")] = "sglang"
    overrides: Annotated[
        tuple[tuple[str, Scheme], ...],
        Param(
            "Use SCHEME for matching layers; the last that fits counts.",
            spelling=OVERRIDES,
            flag="--override",
            metavar="PATTERN=SCHEME",
            adds=True,
            heading="Recipe",
        ),
    ] = ()
    ignore: Annotated[
        tuple[str, ...],
        Param("Leave matching layers float.", metavar="PATTERN", adds=True, heading="Recipe"),
    ] = ()
    algorithm_options: Annotated[
        Mapping[str, Options],
        Param(
            "Options of algorithms: see qplug plugins show ALGO.",
            key=None,  # in the pipeline
            flag="-o",
            metavar="ALGO.PARAM=V",
            of="algorithms",
            heading="Recipe",
        ),
    ] = field(default_factory=dict)
    backend_options: Annotated[
        Options,
        Param(
            "Options of the backend: see qplug plugins show BACKEND.",
            flag="--backend-opt",
            of="backend",
            heading="Result",
        ),
    ] = field(default_factory=dict)
    calibration: Annotated[
        Calibration | None,
        Param(
            "The data that algorithms and observers see.",
            spelling=CALIBRATION,
            heading="Calibration",
        ),
    ] = field(default_factory=Calibration)
    kv_cache: Annotated[
        QuantArgs | None,
        Param("Store scales for a KV cache in this format.", spelling=CACHE, heading="Recipe"),
    ] = None
    use_qtorch: Annotated[
        bool,
        Param("Round floats as qtorch does, for a backend that only measures.", heading="Recipe"),
    ] = False
    seed: Annotated[int, Param("Seed of everything that is drawn.", heading="Recipe")] = 0

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The scheme of the model and those of overrides, as they round."""
        return tuple(map(self.rounding, (self.scheme, *(scheme for _, scheme in self.overrides))))

    def rounding(self, scheme: Scheme) -> Scheme:
        """``scheme`` with its floats rounded as this recipe says."""
        return scheme.with_qtorch() if self.use_qtorch else scheme

    @property
    def stores_ranges(self) -> bool:
        """Whether scales of computed values are stored, which calibration data decides."""
        return self.kv_cache is not None or any(each.static_inputs for each in self.schemes)

    @property
    def uses_qtorch(self) -> bool:
        """Whether the package qtorch rounds anything."""
        return any(scheme.uses_qtorch for scheme in self.schemes)

    def check(self) -> None:
        """Raises QplugError if fields contradict each other."""
        if self.use_qtorch and not self.uses_qtorch:
            raise QplugError(f"use_qtorch: {self.scheme.name} has no float format to round")

    def to_dict(self) -> dict[str, Any]:
        """A plain form for JSON, in which every field is said; ``from_dict`` reads it back."""
        return all_fields(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recipe:
        """The recipe of its plain form. Raises KeyError or TypeError for anything else."""
        return from_dict(cls, plain)


@dataclass(frozen=True)
class Export:
    """A folder to write, for the recipe's backend or for another one."""

    out: Annotated[Path, Param("A new folder.")]
    backend: Annotated[
        str | None,
        Param("Another backend than the recipe's; hf writes transformed float weights."),
    ] = None
    options: Annotated[Options, Param("See qplug plugins show BACKEND.", of="backend")] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class Measurement:
    """The perplexity at some stages. ``windows`` None is all of the text."""

    at: Annotated[tuple[Stage, ...], Param("When the model is measured.")]
    dataset: Annotated[str, Param("A dataset plugin.")] = "demo"
    options: Annotated[Options, Param("See qplug plugins show DATASET.")] = field(
        default_factory=dict
    )
    seq_len: Annotated[int, Param("Tokens in a window.", min=2)] = 512
    windows: Annotated[int | None, Param("The first so many; none is all of the text.", min=1)] = (
        None
    )


@dataclass(frozen=True)
class Job:
    """A recipe for one model, the folders to write and the perplexities to measure.

    It may write several folders (LLMC's ``save_trans`` beside ``save_vllm``) and measure the model
    before, between and after. ``places`` say where in a file a part stands (``algorithms``,
    ``exports.0``), for errors.
    """

    model: Annotated[str | None, Param("A folder, a Hub id, or qplug:demo.")] = None
    recipe: Annotated[Recipe, Param("How the model is quantized.", inline=True)] = field(
        default_factory=Recipe
    )
    exports: Annotated[tuple[Export, ...], Param("The folders to write.", key="export")] = ()
    measurements: Annotated[
        tuple[Measurement, ...], Param("Perplexities to measure.", key="eval")
    ] = ()
    places: Annotated[Mapping[str, str], Param("Where parts stand in a file.", key=None)] = field(
        default_factory=dict, compare=False, repr=False
    )

    def recipe_for(self, export: Export) -> Recipe:
        """The recipe with the backend of ``export``, and the options that belong to it."""
        backend = export.backend or self.recipe.backend
        options = self.recipe.backend_options if backend == self.recipe.backend else {}
        return replace(self.recipe, backend=backend, backend_options={**options, **export.options})
