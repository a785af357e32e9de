"""A model folder on disk: its configuration, where each tensor lies, and the files beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qplug.api import Checkpoint, StoredTensor
from qplug.checkpoint.block_fp8 import as_float, is_block_fp8
from qplug.checkpoint.tensor_file import read_header
from qplug.errors import QplugError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``: ``config.json`` and every shard's header are read.

    A checkpoint that was published in blocks of fp8 is opened as the float one that it means.
    Raises QplugError if the folder is not a checkpoint in safetensors files, a file that the
    index names is missing, a file is a link out of the folder, or a shard is truncated or
    unsound.
    """
    if not folder.is_dir():
        raise QplugError(f"{folder}: no such folder")
    config = read_json(folder / "config.json")
    tensors = _read_tensors(folder)
    if is_block_fp8(config):
        config, tensors = as_float(config, tensors)
    checkpoint = Checkpoint(folder, config, tensors)
    for path in (folder / "config.json", *checkpoint.shards, *checkpoint.companions()):
        _refuse_link_out(path, folder)
    return checkpoint


def _refuse_link_out(path: Path, folder: Path) -> None:
    """Raise QplugError if ``path`` is a link to something outside of ``folder``.

    What a stranger packed could otherwise have any file of this machine read, and copied to OUT.
    The Hub's cache links from ``snapshots/REVISION`` to ``blobs`` beside ``snapshots``.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    found = path.resolve()
    if not (found.is_relative_to(home) or found.is_relative_to(blobs)):
        raise QplugError(f"{path}: is a link out of its folder; put the file itself there")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises QplugError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QplugError(f"{path.parent}: has no {path.name}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QplugError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise QplugError(f"{path}: is not a JSON mapping")
    return found


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise QplugError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        return dict(read_header(folder / SINGLE))
    places = read_json(folder / INDEX).get("weight_map")
    if not (isinstance(places, dict) and places):
        raise QplugError(f"{folder / INDEX}: has no weight_map")
    headers = {}
    for file in sorted(set(map(str, places.values()))):
        if Path(file).name != file or "\0" in file:
            raise QplugError(f"{folder / INDEX}: {file} is not a file of this folder")
        if not (folder / file).is_file():
            raise QplugError(f"{folder / INDEX}: names {file}, which is not there")
        headers[file] = read_header(folder / file)
    for name, file in places.items():
        if name not in headers[file]:
            raise QplugError(f"{folder / INDEX}: {name} is not in {file}")
    return {name: headers[file][name] for name, file in places.items()}
