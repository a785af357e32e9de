"""What decides the bytes of a run, to tell whether a stopped run can go on."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qplug.api.tensors import Checkpoint
from qplug.machine.session import Session
from qplug.recipe.recipe import Recipe
from qplug.registry.plugin import Plugin
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


def fingerprint(
    source: Checkpoint,
    recipe: Recipe,
    session: Session,
    shard_bytes: int,
    tokens: Tensor | None,
) -> dict[str, Any]:
    """All that decides the bytes of a run, part by part, to tell whether a run can go on.

    Sums over tokens depend on the number of processes that share them.
    """
    processes = session.processes.count
    model = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for path in source.shards:
        status = path.stat()
        model.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    for name, tensor in sorted(source.tensors.items()):
        model.update(f"{name} {tensor.location} {tensor.spec}".encode())
    return {
        "model": model.hexdigest(),
        "recipe": recipe.to_dict(),
        "device": session.device.type,
        "shard size": shard_bytes,
        "data": None if tokens is None else hashlib.sha256(tokens.numpy().data).hexdigest(),
        "versions": versions(recipe, session.registry),
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
