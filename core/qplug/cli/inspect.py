"""``qplug inspect``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from qplug.checkpoint.names import kind_of, module_of
from qplug.cli.printing import Command, say, say_json
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from qplug.reading.folder import Folder


@click.command(name="inspect", cls=Command)
@click.argument("folder")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(registry: Registry, folder: str, as_json: bool) -> None:
    """Print the contents of FOLDER: schemes, sizes, recipe. Reads no weight."""
    from qplug.machine.session import Session
    from qplug.reading.folder import open_folder

    opened = open_folder(folder, Session(registry), or_float=True)
    view, manifest = opened.view, opened.manifest
    size = sum(tensor.nbytes for tensor in opened.checkpoint.tensors.values())
    weights = sum(out * width for out, width in view.linears.values())
    contents = {
        "folder": folder,
        "architecture": (view.config.get("architectures") or ["unknown"])[0],
        "backend": opened.exporter.name if opened.exporter else None,
        "read as float from": opened.checkpoint.quantized or None,
        "recipe": "+".join(manifest.algorithms) if manifest else None,
        "source": manifest.model if manifest else None,
        "versions": dict(manifest.versions) if manifest else {},
        "bytes": size,
        "linear weights": weights,
        "bits per linear weight": round(8 * _linear_bytes(opened) / weights, 3),
        "schemes": dict(Counter(scheme.name for scheme in opened.schemes.values())),
        "kv cache": opened.kv_cache.dtype if opened.kv_cache else None,
        "float linears": [name for name in view.linears if name not in opened.schemes],
        "stays float": _stays_float(opened),
    }
    if as_json:
        say_json(contents)
        return
    for key, value in contents.items():
        if key == "stays float":
            for kind, why in _stays_float(opened).items():
                say(f"stays float: {kind}: {why}")
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = f"{len(value)}: {', '.join(value[:4])}" if value else "none"
        say(f"{key}: {value or 'none'}")


def _stays_float(opened: Folder) -> dict[str, str]:
    """The weights in decoder blocks that engines cannot load as codes, and why, by kind."""
    view, stays = opened.view, {}
    kept = opened.manifest.kept_float if opened.manifest else {}
    for name in (*view.linears, *view.other_weights):
        why = view.built_float.get(name)
        if why is not None:
            who = f"{' and '.join(why.engines)}: " if why.engines else ""
            source = f" ({why.source})" if why.source else ""
            stays[kind_of(f"{name}.").removesuffix(".")] = f"{who}{why.reason}{source}"
        elif name in kept:
            stays[kind_of(f"{name}.").removesuffix(".")] = kept[name]
        elif name in view.other_weights:
            stays[kind_of(f"{name}.").removesuffix(".")] = (
                "qplug cannot quantize it: it is no linear layer"
            )
    return stays


def _linear_bytes(opened: Folder) -> int:
    return sum(
        stored.nbytes
        for tensor, stored in opened.checkpoint.tensors.items()
        if module_of(tensor) in opened.view.linears and not tensor.endswith(".bias")
    )
