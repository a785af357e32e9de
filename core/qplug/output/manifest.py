"""What is said of a run beside its weights: config.json, ``qplug.json``, and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qplug.api.scheme import QuantArgs, Scheme
from qplug.calibration.ranges import InputRange
from qplug.checkpoint.open import read_json
from qplug.errors import QplugError
from qplug.recipe.recipe import Recipe

MANIFEST = "qplug.json"

#: The version of the format of ``qplug.json``. Files without one are older, and read the same.
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What ``qplug.json`` of a folder says. ``recipe`` is as ``Recipe.to_dict`` gives it.

    ``losses``, ``inputs`` and ``clips`` are there where calibration data told them.
    """

    model: str
    backend: str
    algorithms: tuple[str, ...]
    versions: Mapping[str, str]
    schemes: Mapping[str, Scheme]
    errors: Mapping[str, float]
    rewritten: frozenset[str]
    kv_cache: QuantArgs | None
    online: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, tuple[InputRange, InputRange]] = field(default_factory=dict)
    clips: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of ``folder``; None if qplug did not write it.

    Raises QplugError if the file is there but makes no sense.
    """
    if not (folder / MANIFEST).exists():
        return None
    told = read_json(folder / MANIFEST)
    version = told.get("version", VERSION)
    if version != VERSION:
        raise QplugError(
            f"{folder / MANIFEST}: has format {version}, and this qplug reads {VERSION}; "
            "install the qplug that wrote the folder"
        )
    try:
        kinds = [Scheme.from_dict(plain) for plain in told["schemes"]]
        layers, recipe = told["layers"], Recipe.from_dict(told["recipe"])
        read = InputRange.from_list
        return Manifest(
            model=told["model"],
            backend=recipe.backend,
            algorithms=recipe.algorithms,
            versions=told["versions"],
            schemes={name: kinds[layer["scheme"]] for name, layer in layers.items()},
            errors={name: layer["error"] for name, layer in layers.items()},
            rewritten=frozenset(told["rewritten"]),
            kv_cache=recipe.kv_cache,
            online=tuple(told.get("online", ())),
            recipe=told["recipe"],
            losses={n: layer["loss"] for n, layer in layers.items() if layer["loss"] is not None},
            inputs={
                name: (read(layer["inputs"]["before"]), read(layer["inputs"]["after"]))
                for name, layer in layers.items()
                if "inputs" in layer
            },
            clips={n: tuple(layer["clips"]) for n, layer in layers.items() if "clips" in layer},
            notes=tuple(told["notes"]),
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise QplugError(f"{folder / MANIFEST}: cannot be understood: {error!r}") from error
