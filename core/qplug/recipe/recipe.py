"""What a run shall do, as data: made from the command line or Python, kept in ``qplug.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qplug.api.scheme import CACHES, QuantArgs, Scheme, preset
from qplug.errors import QplugError

#: Who quantizes where no algorithm of the pipeline does.
DEFAULT_QUANTIZER = "rtn"

#: How windows are cut from the documents of a dataset: see ``qplug.text``.
SAMPLINGS = ("dataset", "windows", "documents", "leading", "packed")


@dataclass(frozen=True)
class Calibration:
    """The data of a run: ``samples`` windows of ``seq_len`` tokens of a dataset.

    ``propagate``: whether a block is fed by the ``quantized`` blocks before it, or the ``float``
    ones. ``observer``: how the ranges of static inputs are found. ``batch_size``: samples in one
    forward pass; None leaves it to the device. ``sampling``: how windows are cut from documents;
    ``dataset`` is the dataset's own way.
    """

    dataset: str = "demo"
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 128
    seq_len: int = 512
    propagate: str = "quantized"
    observer: str = "minmax"
    observer_options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    sampling: str = "dataset"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seq_len < 1:
            raise QplugError("--samples and --seq-len must be at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise QplugError("--batch-size must be at least 1")
        if self.propagate not in ("quantized", "float"):
            raise QplugError(f"--propagate {self.propagate}: must be quantized or float")
        if self.sampling not in SAMPLINGS:
            raise QplugError(f"--sampling {self.sampling}: must be one of {', '.join(SAMPLINGS)}")

    def to_dict(self) -> dict[str, Any]:
        """A plain form for JSON."""
        return {
            **self.__dict__,
            "options": {k: str(v) for k, v in self.options.items()},
            "observer_options": {k: str(v) for k, v in self.observer_options.items()},
        }


@dataclass(frozen=True)
class Recipe:
    """A pipeline of algorithms, a scheme with its exceptions, and a backend.

    ``kv_cache``: how keys and values are stored; None leaves it to whoever serves.
    """

    algorithms: tuple[str, ...]
    scheme: Scheme
    backend: str
    overrides: tuple[tuple[str, Scheme], ...] = ()
    ignore: tuple[str, ...] = ()
    algorithm_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    kv_cache: QuantArgs | None = None
    seed: int = 0

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All that it has: that of the model, and those of overrides."""
        return self.scheme, *(scheme for _, scheme in self.overrides)

    @property
    def stores_ranges(self) -> bool:
        """Whether it writes scales of what the model computes, which only data can tell."""
        return self.kv_cache is not None or any(each.static_inputs for each in self.schemes)

    @property
    def uses_qtorch(self) -> bool:
        """Whether the package qtorch rounds anything."""
        return any(scheme.uses_qtorch for scheme in self.schemes)

    def to_dict(self) -> dict[str, Any]:
        """A plain form for JSON."""
        return {
            "algorithms": list(self.algorithms),
            "scheme": self.scheme.to_dict(),
            "backend": self.backend,
            "overrides": [[pattern, scheme.to_dict()] for pattern, scheme in self.overrides],
            "ignore": list(self.ignore),
            "algorithm_options": {
                name: _plain(options) for name, options in self.algorithm_options.items()
            },
            "backend_options": _plain(self.backend_options),
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "kv_cache": self.kv_cache.to_dict() if self.kv_cache else None,
            "seed": self.seed,
        }


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}


def parse_algorithms(text: str) -> tuple[str, ...]:
    """``"quarot+gptq"`` as names in order. Raises QplugError for an empty or repeated name."""
    names = tuple(part.strip() for part in text.split("+"))
    if not all(names) or len(set(names)) < len(names):
        raise QplugError(f"--algo {text}: say one algorithm, or several as in quarot+gptq")
    return names


def parse_scheme(name: str | Scheme, group_size: int | None = None) -> Scheme:
    """The scheme, by its name or as it is, with another group size if one is given."""
    scheme = preset(name) if isinstance(name, str) else name
    return scheme if group_size is None else scheme.with_group_size(group_size)


def parse_cache(name: str | None) -> QuantArgs | None:
    """How a KV cache called ``name`` is stored; None for none."""
    if name is None:
        return None
    if name not in CACHES:
        raise QplugError(f"--kv-cache {name}: there is {', '.join(CACHES)}")
    return CACHES[name]


def with_qtorch(recipe: Recipe) -> Recipe:
    """``recipe`` with the floats of all its schemes rounded by the package qtorch.

    Raises QplugError if no scheme has a float format.
    """
    changed = replace(
        recipe,
        scheme=recipe.scheme.with_qtorch(),
        overrides=tuple((pattern, scheme.with_qtorch()) for pattern, scheme in recipe.overrides),
    )
    if not changed.uses_qtorch:
        raise QplugError(f"use_qtorch: {recipe.scheme.name} has no float format to round")
    return changed
