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

#: The version of the format of ``qplug.json``. Older files have no version, but the same format.
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The contents of the ``qplug.json`` of a folder.

    ``recipe`` is a ``Recipe.to_dict``. By name of the linear: ``schemes``, ``errors``, ``losses``,
    ``inputs`` (the range of its inputs in the float model, and in the quantized model) and
    ``clips``. The last three exist only for linears that calibration data measured. ``rewritten``
    names tensors that an algorithm rewrote, ``online`` linears whose inputs must be rotated as the
    model runs.
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
    """Read the manifest of ``folder``; None if qplug did not write the folder.

    Raises QplugError if the file exists but is damaged, or if another version of qplug wrote it.
    """
    if not (folder / MANIFEST).exists():
        return None
    record = read_json(folder / MANIFEST)
    version = record.get("version", VERSION)
    if version != VERSION:
        raise QplugError(
            f"{folder / MANIFEST}: has format {version}, but this qplug reads {VERSION}; "
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
        raise QplugError(f"{folder / MANIFEST}: is damaged: {error!r}") from error
