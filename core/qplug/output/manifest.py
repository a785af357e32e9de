"""Reads ``qplug.json``, the record of a run in the folder that it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qplug.api.scheme import QuantArgs, Scheme
from qplug.calibration.ranges import InputRange
from qplug.checkpoint.open import read_json
from qplug.errors import QplugError

MANIFEST = "qplug.json"

#: The version of the format of ``qplug.json``. Files without one are older, and read the same.
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The contents of the ``qplug.json`` of a folder. ``recipe`` is a ``Recipe.to_dict``.

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
    record = read_json(folder / MANIFEST)
    version = record.get("version", VERSION)
    if version != VERSION:
        raise QplugError(
            f"{folder / MANIFEST}: has format {version}, and this qplug reads {VERSION}; "
            "install the qplug that wrote the folder"
        )
    try:
        kinds = [Scheme.from_dict(plain) for plain in record["schemes"]]
        layers, recipe = record["layers"], record["recipe"]
        cache = recipe["kv_cache"]
        read = InputRange.from_list
        return Manifest(
            model=record["model"],
            backend=recipe["backend"],
            algorithms=tuple(recipe["algorithms"]),
            versions=record["versions"],
            schemes={name: kinds[layer["scheme"]] for name, layer in layers.items()},
            errors={name: layer["error"] for name, layer in layers.items()},
            rewritten=frozenset(record["rewritten"]),
            kv_cache=QuantArgs.from_dict(cache) if cache else None,
            online=tuple(record.get("online", ())),
            recipe=recipe,
            losses={n: layer["loss"] for n, layer in layers.items() if layer["loss"] is not None},
            inputs={
                name: (read(layer["inputs"]["before"]), read(layer["inputs"]["after"]))
                for name, layer in layers.items()
                if "inputs" in layer
            },
            clips={n: tuple(layer["clips"]) for n, layer in layers.items() if "clips" in layer},
            notes=tuple(record["notes"]),
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise QplugError(f"{folder / MANIFEST}: cannot be understood: {error!r}") from error
