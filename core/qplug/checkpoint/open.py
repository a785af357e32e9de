"""Opens a model folder: reads its configuration and finds each tensor, without reading weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qplug.api import Checkpoint, SingleFile, StoredTensor
from qplug.checkpoint.block_fp8 import as_float, is_block_fp8
from qplug.checkpoint.tensor_file import read_header
from qplug.errors import QplugError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def open_checkpoint(folder: Path, single_file: SingleFile | None = None) -> Checkpoint:
    """Returns the checkpoint in ``folder``, after reading config.json and every shard's header.

    A checkpoint that was published in blocks of fp8 is opened as the float model that it stands
    for. A folder that has ``single_file`` in place of safetensors files is read by it. Raises
    QplugError if the folder is not a checkpoint, if a file that the index names is missing, if a
    file is a link to outside the folder, or if a shard is truncated or malformed.
    """
    if not folder.is_dir():
        raise QplugError(f"{folder}: no such folder")
    config = read_json(folder / "config.json")
    file = folder / single_file.name if single_file else None
    if single_file and file and file.is_file() and not any(folder.glob("*.safetensors")):
        return Checkpoint(folder, config, single_file.read(file, config))
    tensors = _read_tensors(folder)
    if is_block_fp8(config):
        config, tensors = as_float(config, tensors)
    checkpoint = Checkpoint(folder, config, tensors)
    for path in (folder / "config.json", *checkpoint.shards, *checkpoint.companions()):
        _refuse_link_out(path, folder)
    return checkpoint


def _refuse_link_out(path: Path, folder: Path) -> None:
    """Raises QplugError if ``path`` is a link to something outside of ``folder``.

    Otherwise a folder from a stranger could make qplug read any file of this machine and copy it
    to OUT. The Hub's cache is allowed: it links from ``snapshots/REVISION`` to ``blobs``, a
    neighbour of ``snapshots``.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    target = path.resolve()
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise QplugError(f"{path}: is a link out of its folder; put the file itself there")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON file.

    Raises QplugError if the file is missing, cannot be read, or does not hold a mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QplugError(f"{path.parent}: has no {path.name}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QplugError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise QplugError(f"{path}: is not a JSON mapping")
    return content


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of ``folder`` by name, from the index or from a single file."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise QplugError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        return dict(read_header(folder / SINGLE))
    file_of = read_json(folder / INDEX).get("weight_map")
    if not (isinstance(file_of, dict) and file_of):
        raise QplugError(f"{folder / INDEX}: has no weight_map")
    headers = {}
    for file in sorted(set(map(str, file_of.values()))):
        if Path(file).name != file or "\0" in file:
            raise QplugError(f"{folder / INDEX}: {file} is not a file of this folder")
        if not (folder / file).is_file():
            raise QplugError(f"{folder / INDEX}: names {file}, which is not there")
        headers[file] = read_header(folder / file)
    for name, file in file_of.items():
        if name not in headers[file]:
            raise QplugError(f"{folder / INDEX}: {name} is not in {file}")
    return {name: headers[file][name] for name, file in file_of.items()}
