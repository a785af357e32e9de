"""Opens a model folder: reads its configuration and finds each tensor, without reading weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qplug.api import Checkpoint, Reader, SingleFile, StoredTensor
from qplug.checkpoint.config_file import CONFIG, read_config, refuse_absurd
from qplug.checkpoint.sources import read_as_float
from qplug.checkpoint.tensor_file import read_header
from qplug.checkpoint.unindexed import draft_tensors
from qplug.errors import QplugError
from qplug.files.json_text import read_json
from qplug.files.regular import refuse_link_out
from qplug.files.typed import Typed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Where older releases of ModelOpt say how weights are quantized, in place of config.json.
MODELOPT = "hf_quant_config.json"
#: Files of JSON that servers read, and qplug only copies.
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)


def open_checkpoint(
    folder: Path, single_file: SingleFile | None = None, *, readers: Iterable[Reader] = ()
) -> Checkpoint:
    """Returns the checkpoint in ``folder``, after reading config.json and every shard's header.

    A checkpoint that one of ``readers`` reads is opened as the float model that it stands for;
    ``Registry.sources`` has the readers of all plugins. A folder that has ``single_file`` in place
    of safetensors files is read by it. Raises QplugError if the folder is not a checkpoint, if a
    file that the index names is missing, if a file is a link to outside the folder, if a shard is
    truncated or malformed, or if quantized weights lack what they are read with.
    """
    if not folder.is_dir():
        raise QplugError(f"{folder}: no such folder")
    config = _with_quantization(folder, read_config(folder))
    file = folder / single_file.name if single_file else None
    if single_file and file and file.is_file() and not any(folder.glob("*.safetensors")):
        refuse_link_out(file, folder)
        return Checkpoint(folder, config, single_file.read(file, config))
    tensors = _read_tensors(folder, config)
    refuse_absurd(folder / CONFIG, config, tensors)
    checkpoint = read_as_float(Checkpoint(folder, config, tensors), readers)
    for path in checkpoint.companions():
        refuse_link_out(path, folder)
    return checkpoint


def _with_quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns ``config`` with the quantization of ModelOpt's own file, if it says none itself."""
    path = folder / MODELOPT
    if Reader.quantization(config) or not os.path.lexists(path):
        return config
    found = Typed(str(path), read_json(path, within=folder, strict=False)).get("quantization")
    if found is None:
        return config
    found.mapping()
    return {**config, "quantization_config": {**found.value, "quant_method": "modelopt"}}


def check_companions(folder: Path) -> None:
    """Raises QplugError if a file of JSON that servers read beside the weights is none."""
    for name in COMPANIONS:
        if os.path.lexists(folder / name):
            read_json(folder / name, within=folder, strict=False)


def _read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Returns the tensors of ``folder`` by name: those that the index names, and draft layers."""
    tensors, files = _indexed(folder)
    return {**tensors, **draft_tensors(folder, config, tensors, files)}


def _indexed(folder: Path) -> tuple[dict[str, StoredTensor], set[str]]:
    """Returns the tensors of ``folder`` by name, and their files: of the index or a single file."""
    index = folder / INDEX
    if not os.path.lexists(index):
        if not os.path.lexists(folder / SINGLE):
            raise QplugError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        return dict(read_header(folder / SINGLE, within=folder)), {SINGLE}
    weight_map = Typed(str(index), read_json(index, within=folder)).get("weight_map")
    file_of = {n: file.text() for n, file in weight_map.mapping().items()} if weight_map else {}
    if not file_of:
        raise QplugError(f"{index}: has no weight_map")
    headers = {}
    for file in sorted(set(file_of.values())):
        if file in ("", ".", "..") or "/" in file or "\0" in file:
            raise QplugError(f"{index}: {file[:300]} is not a file of this folder")
        if not os.path.lexists(folder / file):
            raise QplugError(f"{index}: names {file[:300]}, which is not there")
        headers[file] = read_header(folder / file, within=folder)
    for name, file in file_of.items():
        if name not in headers[file]:
            raise QplugError(f"{index}: {name[:300]} is not in {file[:300]}")
    return {name: headers[file][name] for name, file in file_of.items()}, {*headers}
