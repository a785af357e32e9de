"""Files of weights that the index of a checkpoint does not name: draft layers, and second copies.

Some publishers add draft layers in a file of their own (``mtp.safetensors``), which is a part of
the model. Others add the whole model again under names of another program
(``consolidated.safetensors``), which is not. Only tensors with names of draft layers are taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qplug.api import Checkpoint, StoredTensor
from qplug.checkpoint.draft_names import block_count, is_draft
from qplug.checkpoint.tensor_file import read_header
from qplug.errors import QplugError


def draft_tensors(
    folder: Path, config: Mapping[str, Any], known: Collection[str], files: Collection[str]
) -> dict[str, StoredTensor]:
    """Returns tensors of draft layers in ``folder`` that are not among ``known`` ones, by name.

    ``files`` are the names of the files that the index names. A file that cannot be read is no part
    of the checkpoint.
    """
    blocks = block_count(config)
    found: dict[str, StoredTensor] = {}
    for path in _others(folder, files):
        try:
            header = read_header(path, within=folder)
        except QplugError:
            continue
        for name, stored in header.items():
            if name not in known and is_draft(name, blocks):
                found.setdefault(name, stored)
    return found


def left_behind(checkpoint: Checkpoint) -> list[str]:
    """Returns a sentence for each file of weights in the folder of which nothing is read."""
    files = {path.name for path in checkpoint.shards}
    return [
        f"{path.name} is left behind: the index does not name it, and its tensors are not those of "
        "draft layers"
        for path in _others(checkpoint.folder, files)
    ]


def _others(folder: Path, files: Collection[str]) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.name not in files)
