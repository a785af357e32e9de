"""A job: all that a recipe or the command line asks for, ready to be run.

A job is one pipeline over one model. It may write several folders (LLMC's ``save_trans`` beside
``save_vllm``) and measure the model before, between and after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from qplug.api.params import fill
from qplug.api.scheme import Scheme, preset
from qplug.errors import QplugError
from qplug.recipe.pipeline import make_pipeline
from qplug.recipe.recipe import Calibration
from qplug.registry.registry import Registry

#: When a model is measured: as it came, after all transforms, and quantized.
Stage: TypeAlias = Literal["pretrain", "transformed", "quantized"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Export:
    """A folder to write."""

    out: Path
    backend: str = "sglang"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """The perplexity at some stages. ``windows`` None is all of the text."""

    at: tuple[Stage, ...]
    dataset: str = "demo"
    options: Mapping[str, Any] = field(default_factory=dict)
    seq_len: int = 512
    windows: int | None = None


@dataclass(frozen=True)
class Job:
    """What ``qplug.quantize`` takes, once for all folders that are to be written.

    ``places`` tell where in a file a part was said (``algorithms``, ``exports.0``), for errors.
    """

    model: str | None = None
    algorithms: tuple[str, ...] = ("rtn",)
    algorithm_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scheme: Scheme = field(default_factory=lambda: preset("W4A16"))
    overrides: tuple[tuple[str, Scheme], ...] = ()
    ignore: tuple[str, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    observer: str = "minmax"
    kv_cache: str | None = None
    use_qtorch: bool = False
    seed: int = 0
    exports: tuple[Export, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def check(self, registry: Registry) -> None:
        """Raises QplugError for all that can be known to be wrong, and says where it stands.

        That is what ``check_names`` finds, and a pipeline that makes no sense. What only the model
        can tell (widths, names of layers) is not asked.
        """
        self.check_names(registry)
        schemes = (self.scheme, *(scheme for _, scheme in self.overrides))
        told = self.algorithms, self.algorithm_options, schemes, registry
        self._placed("algorithms", make_pipeline, *told)

    def check_names(self, registry: Registry) -> None:
        """Raises QplugError for a name or an option that no plugin has, and says where it stands.

        A pipeline is whole only once the command line has had its say, so it is not judged.
        """
        for name in self.algorithms:
            with_place = f"algorithms.{name}"
            kind = self._found(registry.algorithms, name, with_place)
            options = self.algorithm_options.get(name, {})
            self._placed(with_place, fill, kind.Params, options, f"algorithm {name}")
        if "calibration" in self.places or self.calibration != Calibration():
            dataset = self._found(registry.datasets, self.calibration.dataset, "calibration")
            options = self.calibration.options
            self._placed("calibration", fill, dataset.Params, options, f"dataset {dataset.name}")
        for number, export in enumerate(self.exports):
            kind = self._found(registry.exporters, export.backend, f"exports.{number}")
            told = f"backend {export.backend}"
            self._placed(f"exports.{number}", fill, kind.Params, export.options, told)
        for number, measurement in enumerate(self.measurements):
            where = f"measurements.{number}"
            kind = self._found(registry.datasets, measurement.dataset, where)
            told = f"dataset {measurement.dataset}"
            self._placed(where, fill, kind.Params, measurement.options, told)

    def _found(self, offers: Any, name: str, place: str) -> Any:
        return self._placed(place, offers.__getitem__, name)

    def _placed(self, place: str, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except QplugError as error:
            if place in self.places and not str(error).startswith(self.places[place]):
                raise QplugError(f"{self.places[place]}: {error}") from error
            raise
