"""What is said of a run beside its weights: config.json, ``qplug.json``, and the model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from qplug.api import Exporter, ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.calibration.ranges import InputRange
from qplug.checkpoint.open import Checkpoint, read_json
from qplug.errors import QplugError
from qplug.recipe.recipe import Recipe
from qplug.registry.registry import Plugin, Registry
from qplug.run.stages import Report

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "qplug.json"

_CARD = Template("""\
---
tags:
- qplug
- $tag
---
# $title

$model $made by qplug $version: `$algorithms`, scheme `$scheme`, for `$backend`.

$told
`$manifest` has the recipe, the versions, and the error of each layer.

Check this folder with `qplug verify .`$serve.
""")


def fingerprint(
    source: Checkpoint,
    recipe: Recipe,
    registry: Registry,
    device: str,
    shard_bytes: int,
    tokens: Tensor | None,
    processes: int = 1,
) -> dict[str, Any]:
    """All that decides the bytes of a run, part by part, to tell whether a run can go on.

    Sums over tokens depend on how many processes took them.
    """
    model = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for path in source.shards:
        status = path.stat()
        model.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    for name, tensor in sorted(source.tensors.items()):
        model.update(f"{name} {tensor.path.name} {tensor.start} {tensor.spec}".encode())
    return {
        "model": model.hexdigest(),
        "recipe": recipe.to_dict(),
        "device": device,
        "shard size": shard_bytes,
        "data": None if tokens is None else hashlib.sha256(tokens.numpy().data).hexdigest(),
        "versions": versions(recipe, registry),
        **({"number of processes": processes} if processes > 1 and tokens is not None else {}),
    }


def versions(recipe: Recipe, registry: Registry) -> dict[str, str]:
    """The versions of what computed: qplug, torch, and the packages of the plugins used."""
    used = [plugin for name in recipe.algorithms for plugin in registry.algorithms.owners(name)]
    used += registry.exporters.owners(recipe.backend)
    plugins = dict(_version(plugin) for plugin in used)
    rounder = {"qtorch": version("qtorch")} if recipe.uses_qtorch else {}
    return {**plugins, **rounder, "qplug": version("qplug"), "torch": version("torch")}


def _version(plugin: Plugin) -> tuple[str, str]:
    """The package of a plugin and its version; for a file, its name and what it holds."""
    if plugin.is_file:
        return plugin.name, hashlib.sha256(Path(plugin.source).read_bytes()).hexdigest()[:16]
    package, _, number = plugin.source.rpartition(" ")
    return package, number


def result_files(
    name: str,
    model: ModelView,
    recipe: Recipe,
    exporter: Exporter[Any],
    schemes: Mapping[str, Scheme],
    reports: Sequence[Report],
    registry: Registry,
    *,
    online: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> dict[str, str]:
    """The text files of a finished run, by file name. They say nothing of when or how long.

    ``online`` are linears whose inputs whoever computes with the folder must rotate.
    """
    config = dict(model.config)
    quantization = exporter.config(model, schemes)
    if recipe.kv_cache is not None:
        quantization = exporter.with_cache(quantization, recipe.kv_cache)
    if quantization is not None:
        config["quantization_config"] = quantization
    errors = {name: error for report in reports for name, error in report.errors.items()}
    losses = {name: loss for report in reports for name, loss in report.losses.items()}
    ranges = _ranges(reports)
    kinds = list(dict.fromkeys(schemes.values()))
    manifest = {
        "model": name,
        "recipe": recipe.to_dict(),
        "versions": versions(recipe, registry),
        "schemes": [scheme.to_dict() for scheme in kinds],
        "layers": {
            name: {
                "scheme": kinds.index(s),
                "error": errors[name],
                "loss": losses.get(name),
                **ranges.get(name, {}),
            }
            for name, s in schemes.items()
        },
        "rewritten": sorted(name for report in reports for name in report.rewritten),
        "online": list(online),
        "notes": [*notes, *(note for report in reports for note in report.notes)],
    }
    return {
        "config.json": _json(config),
        MANIFEST: _json(manifest),
        "README.md": _card(name, recipe, exporter, errors, exporter.serve_arguments(config)),
    }


def _ranges(reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """What reports tell of inputs and clips, by linear; nothing of those they do not mention."""
    told: dict[str, dict[str, Any]] = {}
    for report in reports:
        for name, (before, after) in report.inputs.items():
            ranges = {"before": before.to_list(), "after": after.to_list()}
            told.setdefault(name, {})["inputs"] = ranges
        for name, counts in report.clips.items():
            told.setdefault(name, {})["clips"] = list(counts)
    return told


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
    try:
        kinds = [Scheme.from_dict(plain) for plain in told["schemes"]]
        layers, cache = told["layers"], told["recipe"]["kv_cache"]
        read = InputRange.from_list
        return Manifest(
            model=told["model"],
            backend=told["recipe"]["backend"],
            algorithms=tuple(told["recipe"]["algorithms"]),
            versions=told["versions"],
            schemes={name: kinds[layer["scheme"]] for name, layer in layers.items()},
            errors={name: layer["error"] for name, layer in layers.items()},
            rewritten=frozenset(told["rewritten"]),
            kv_cache=QuantArgs.from_dict(cache) if cache else None,
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


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _told(errors: Mapping[str, float]) -> str:
    if not errors:
        return "Its weights are float, as the algorithms transformed them; none is quantized."
    mean = sum(errors.values()) / len(errors)
    return f"{len(errors)} linear layers hold codes; mean relative error of a weight: {mean:.4f}."


def _card(
    name: str,
    recipe: Recipe,
    exporter: Exporter[Any],
    errors: Mapping[str, float],
    arguments: Sequence[str],
) -> str:
    serve = exporter.serve_command and " ".join([exporter.serve_command.format("."), *arguments])
    return _CARD.substitute(
        tag=recipe.scheme.name.lower(),
        title=f"{name.rstrip('/').rpartition('/')[2]}, {recipe.scheme.name}",
        model=f"`{name}`",
        version=version("qplug"),
        algorithms="+".join(recipe.algorithms),
        scheme=recipe.scheme.name,
        backend=recipe.backend,
        made="transformed" if exporter.stores_float else "quantized",
        told=_told(errors),
        manifest=MANIFEST,
        serve=f"; serve it with `{serve}`" if serve else "",
    )
