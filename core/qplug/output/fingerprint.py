"""Identifies everything that decides the bytes of a run, so that a stopped run can continue."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qplug.api.tensors import Checkpoint
from qplug.calibration.samples import Samples
from qplug.checkpoint.config_file import CONFIG
from qplug.checkpoint.open import MODELOPT
from qplug.machine.session import Session
from qplug.output.checksums import file_checksum
from qplug.recipe.recipe import Recipe
from qplug.registry.plugin import Plugin
from qplug.registry.registry import Registry

_LIBRARIES = ("numpy", "safetensors", "torch", "transformers")
_PAGE = 4096  # bytes
_LEAST_PAGES, _MOST_PAGES = 8, 64  # that are sampled of a file of weights
_SAMPLERS = 16  # threads: a disk finds many pages at a time as fast as one
_PAGES_IN_ALL = 1024  # a model has up to hundreds of files, and some disks find 100 pages a second


def fingerprint(
    source: Checkpoint,
    recipe: Recipe,
    session: Session,
    shard_bytes: int,
    samples: Samples | None,
    *,
    learns: bool = False,
) -> dict[str, Any]:
    """A record of everything that decides the bytes of a run, by name of the part.

    A stopped run continues only if its record is equal; a message names the part that differs.
    ``shard_bytes`` is the size of a weight file in bytes, ``samples`` the calibration samples, or
    None. The number of processes counts for a run with samples, because sums over tokens depend on
    how processes share them. ``learns`` is whether an algorithm learns
    on the whole model; only then the number of threads counts.
    """
    processes = session.processes.count
    threads = {"OMP_NUM_THREADS": torch.get_num_threads()} if learns else {}
    model = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    pages = max(_LEAST_PAGES, min(_MOST_PAGES, _PAGES_IN_ALL // max(1, len(source.shards))))
    sizes = {path: path.stat() for path in source.shards}
    with ThreadPoolExecutor(_SAMPLERS, "qplug-sampler") as pool:
        samples_of = pool.map(lambda path: _sample(path, sizes[path].st_size, pages), sizes)
        for (path, status), sample in zip(sizes.items(), samples_of, strict=True):
            model.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
            model.update(sample)
    for path in source.companions():  # the tokenizer, and Python code that belongs to the model
        model.update(f"{path.name} {file_checksum(path)}".encode(errors="surrogateescape"))
    if source.quantized:  # how a reader computes weights, which source.config no longer says
        for file in (CONFIG, MODELOPT):
            if (source.folder / file).is_file():
                model.update(f"{file} {file_checksum(source.folder / file)}".encode())
    for name, tensor in sorted(source.tensors.items()):
        model.update(f"{name} {tensor.location} {tensor.spec}".encode())
    return {
        "model": model.hexdigest(),
        "recipe": recipe.to_dict(),
        "device": session.device.type,
        "shard size": shard_bytes,
        "data": None if samples is None else samples.digest(),
        "versions": versions(recipe, session.registry),
        **threads,
        **({"number of processes": processes} if processes > 1 and samples is not None else {}),
    }


def _sample(path: Path, size: int, pages: int) -> bytes:
    """Returns the hash of the first page of a file, the last one, and others evenly between."""
    found = hashlib.sha256()
    last = max(0, size - _PAGE)
    with path.open("rb") as file:
        for number in range(pages):
            file.seek(last * number // (pages - 1))
            found.update(file.read(_PAGE))
    return found.digest()


def versions(recipe: Recipe, registry: Registry) -> dict[str, str]:
    """The versions of all packages that decide the bytes of a run.

    They are qplug, the libraries that compute, and the packages of plugins that ``recipe`` uses.
    """
    used = [plugin for name in recipe.algorithms for plugin in registry.algorithms.owners(name)]
    used += registry.exporters.owners(recipe.backend)
    plugins = dict(_version(plugin) for plugin in used)
    rounder = {"qtorch": version("qtorch")} if recipe.uses_qtorch else {}
    libraries = {package: version(package) for package in ("qplug", *_LIBRARIES)}
    return {**plugins, **rounder, **libraries}


def _version(plugin: Plugin) -> tuple[str, str]:
    """The package of a plugin and its version; for a plugin file, its name and a hash of it."""
    if plugin.is_file:
        return plugin.name, hashlib.sha256(Path(plugin.source).read_bytes()).hexdigest()[:16]
    package, _, number = plugin.source.rpartition(" ")
    return package, number
