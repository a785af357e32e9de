"""Recipes and jobs: what a run does, as data.

qplug derives from the fields of ``Recipe`` the options of ``qplug quantize``, the keywords of
``qplug.quantize``, the keys of recipe files, ``recipe`` in ``qplug.json``, the rows of the report
and the reference page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from qplug.api.params import Param, Spelling, check_fields
from qplug.api.scheme import QuantArgs, Scheme, preset
from qplug.errors import QplugError
from qplug.recipe.budget import Budget
from qplug.recipe.fields import all_fields, from_dict
from qplug.recipe.mix import Share, shares_of
from qplug.recipe.spellings import AUTO, CACHE, OVERRIDES, PIPELINE, SCHEME, Options

#: The algorithm that chooses codes if no algorithm of the pipeline does.
DEFAULT_QUANTIZER = "rtn"

#: How qplug cuts windows from the documents of a dataset: see ``qplug.text``.
Sampling: TypeAlias = Literal["dataset", "windows", "documents", "leading", "packed"]
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)

#: The tokens that statistics leave out.
Mask: TypeAlias = Literal["none", "prompts"]
SeenExperts: TypeAlias = Literal["routed", "all"]

#: Whether the inputs of a block come from quantized or float blocks in calibration.
Propagation: TypeAlias = Literal["quantized", "float"]

#: What a run does with the layers of a model that draft tokens ahead of it.
DraftLayers: TypeAlias = Literal["keep", "quantize", "drop"]

#: The names of observers, which determine the ranges of static inputs.
ObserverName: TypeAlias = Literal["minmax", "moving-average", "histogram"]

#: The stages at which a model can be measured: the float model, after all transforms, quantized.
Stage: TypeAlias = Literal["pretrain", "transformed", "quantized"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Calibration:
    """The calibration data of a run, and how the run uses it.

    Raises QplugError for a value out of bounds.
    """

    dataset: Annotated[
        str,
        Param("The dataset plugin to calibrate on, or several: text:96+pileval:32 samples."),
    ] = "demo"
    options: Annotated[
        Options,
        Param(
            "Options of the dataset, such as path=mine.txt: see qplug plugins show DATASET. In a "
            "mix: DATASET.K=V.",
            word="dataset_options",
            flag="--dataset-opt",
            of="dataset",
        ),
    ] = field(default_factory=dict)
    samples: Annotated[int, Param("Windows of text.", min=1)] = 128
    seq_len: Annotated[int, Param("Tokens in a window.", min=1)] = 512
    propagate: Annotated[
        Propagation,
        Param("Whether the inputs of a block come from the quantized or the float blocks before."),
    ] = "quantized"
    observer: Annotated[ObserverName, Param("How to determine the ranges of static inputs.")] = (
        "minmax"
    )
    observer_options: Annotated[
        Options, Param("Options of the observer.", flag="--observer-opt", of="observer")
    ] = field(default_factory=dict)
    batch_size: Annotated[
        int | None, Param("Samples in one forward pass; default: as many as fit.", min=1)
    ] = None
    sampling: Annotated[
        Sampling,
        Param(
            "Where windows begin: as the dataset prefers; anywhere in the joined text; anywhere in "
            "a document; at the start of a document; or short documents are joined into windows.",
            of="dataset",
        ),
    ] = "dataset"
    mask: Annotated[
        Mask,
        Param(
            "Tokens that statistics leave out, although blocks see them: none, or all of a "
            "conversation but the assistant's messages.",
        ),
    ] = "none"
    experts: Annotated[
        SeenExperts,
        Param(
            "The tokens in the statistics of an expert: those that are routed to it, or all of "
            "the layer.",
        ),
    ] = "routed"

    def __post_init__(self) -> None:
        check_fields(self)
        shares_of(self.dataset, self.options, self.samples)

    @property
    def shares(self) -> tuple[Share, ...]:
        """The datasets of the samples, each with its options and its number of samples."""
        return shares_of(self.dataset, self.options, self.samples)


CALIBRATION = Spelling(
    Calibration,
    read=lambda part: {"calibration": part},
    write=lambda recipe: recipe.calibration or Calibration(),
    parse=lambda part: part,
)


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model: algorithms, a scheme with its exceptions, a backend, and data.

    ``calibration`` is None in the record of a run that needed no data.
    """

    algorithms: Annotated[
        tuple[str, ...],
        Param(
            "An algorithm, or several in order as A+B; at most one of them chooses codes.",
            key="pipeline",
            spelling=PIPELINE,
            word="algo",
            heading="Recipe",
        ),
    ] = ("rtn",)
    scheme: Annotated[
        Scheme,
        Param(
            "How layers are stored: see qplug schemes. int4, int8 and fp8 mean W4A16, W8A8 and "
            "FP8_DYNAMIC; auto chooses for each layer, within a budget.",
            spelling=SCHEME,
            heading="Recipe",
        ),
    ] = field(default_factory=lambda: preset("W4A16"))
    backend: Annotated[
        str, Param("Engine or format to export for.", heading="Model and output")
    ] = "sglang"
    overrides: Annotated[
        tuple[tuple[str, Scheme], ...],
        Param(
            "Use SCHEME for matching layers; the last match wins.",
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
    mtp: Annotated[
        DraftLayers,
        Param(
            "What becomes of layers that draft tokens (MTP): they stay float, are rounded to "
            "nearest in the scheme, or are left out.",
            heading="Recipe",
        ),
    ] = "keep"
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
            "Options of the backend, such as gpu=H100 or tp=2: see qplug plugins show BACKEND.",
            flag="--backend-opt",
            of="backend",
            heading="Model and output",
        ),
    ] = field(default_factory=dict)
    calibration: Annotated[
        Calibration | None,
        Param(
            "The data for algorithms and observers.",
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
    seed: Annotated[int, Param("Seed of all random choices.", heading="Recipe")] = 0
    budget: Annotated[
        Budget,
        Param(
            "What the schemes that auto chooses may cost: one of three limits.", heading="Recipe"
        ),
    ] = field(default_factory=Budget)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The scheme of the model and the schemes of overrides, each as ``rounding`` returns it."""
        return tuple(map(self.rounding, (self.scheme, *(scheme for _, scheme in self.overrides))))

    def rounding(self, scheme: Scheme) -> Scheme:
        """``scheme``, with floats rounded as qtorch does if ``use_qtorch`` is set."""
        return scheme.with_qtorch() if self.use_qtorch else scheme

    @property
    def stores_ranges(self) -> bool:
        """Whether the result stores ranges of inputs or of a KV cache, which needs data."""
        return self.kv_cache is not None or any(scheme.static_inputs for scheme in self.schemes)

    @property
    def uses_qtorch(self) -> bool:
        """Whether the run needs the package qtorch to round."""
        return any(scheme.uses_qtorch for scheme in self.schemes)

    @property
    def is_auto(self) -> bool:
        """Whether a search is to choose the schemes, within ``budget``."""
        return self.scheme == AUTO

    def check(self) -> None:
        """Raise QplugError if fields contradict each other."""
        self.budget.check(is_auto=self.is_auto)
        for pattern, scheme in self.overrides:
            if scheme == AUTO:
                raise QplugError(f"--override {pattern}=auto: auto is for the whole model")
        if self.use_qtorch and not self.uses_qtorch:
            name = self.scheme.name
            raise QplugError(f"use_qtorch: {name} has no float format to round; leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain value for JSON; ``from_dict`` reads them back."""
        return all_fields(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recipe:
        """Create a recipe from the result of ``to_dict``; missing fields get their default.

        Raises KeyError or TypeError if ``plain`` is no such result.
        """
        return from_dict(cls, plain)


@dataclass(frozen=True)
class Export:
    """A folder to write, for the recipe's backend or for a backend of its own."""

    out: Annotated[Path, Param("A new folder.")]
    backend: Annotated[
        str | None,
        Param("A backend instead of the recipe's; hf writes transformed float weights."),
    ] = None
    options: Annotated[Options, Param("See qplug plugins show BACKEND.", of="backend")] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class Measurement:
    """A perplexity to measure at some stages. ``windows=None`` reads the whole text."""

    at: Annotated[tuple[Stage, ...], Param("The stages at which to measure the model.")]
    dataset: Annotated[str, Param("A dataset plugin.")] = "demo"
    options: Annotated[Options, Param("See qplug plugins show DATASET.")] = field(
        default_factory=dict
    )
    seq_len: Annotated[int, Param("Tokens in a window.", min=2)] = 512
    windows: Annotated[
        int | None, Param("Number of windows, from the start of the text; none is all.", min=1)
    ] = None


@dataclass(frozen=True)
class Job:
    """A recipe for one model, the folders to write and the perplexities to measure.

    A job may write several folders (LLMC's ``save_trans`` and ``save_vllm``) and measure the model
    at several stages. ``places`` maps parts of the job (``algorithms``, ``exports.0``) to their
    places in the job's file, for error messages.
    """

    model: Annotated[str | None, Param("A folder, a Hub id, or qplug:demo.")] = None
    recipe: Annotated[Recipe, Param("How to quantize the model.", inline=True)] = field(
        default_factory=Recipe
    )
    exports: Annotated[tuple[Export, ...], Param("The folders to write.", key="export")] = ()
    measurements: Annotated[
        tuple[Measurement, ...], Param("Perplexities to measure.", key="eval")
    ] = ()
    places: Annotated[Mapping[str, str], Param("Places of parts in a file.", key=None)] = field(
        default_factory=dict, compare=False, repr=False
    )

    def recipe_for(self, export: Export) -> Recipe:
        """The recipe with the backend of ``export`` and the options for that backend."""
        backend = export.backend or self.recipe.backend
        options = self.recipe.backend_options if backend == self.recipe.backend else {}
        return replace(self.recipe, backend=backend, backend_options={**options, **export.options})
