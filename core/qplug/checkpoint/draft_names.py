"""Names of draft layers, which predict tokens ahead of the model (MTP, nextn).

Publishers name them so (``mtp.layers.0``, ``model.mtp_layers.0``, ``model.mtp_block.0``), or number
them on after the last decoder block (``model.layers.61`` of a model of 61 blocks).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Numbers of draft layers in config.json, by the names that models give them.
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")

_MARK = re.compile(r"(?:^|\.)(?:mtp|nextn)(?:_\w+)?\.")
_NUMBER = re.compile(r"^(?P<list>.*?)\.(?P<number>\d+)\.")


def is_draft(name: str, blocks: int | None, of: str | None = None) -> bool:
    """Whether the tensor or linear ``name`` is a part of a draft layer of a model.

    ``blocks``: the number of decoder blocks, None if it is not known. ``of``: the name of the list
    of blocks (``model.layers``); None for lists of all names.
    """
    if _MARK.search(name):
        return True
    found = _NUMBER.match(name)
    if found is None or blocks is None or of not in (None, found["list"]):
        return False
    return int(found["number"]) >= blocks


def inside_draft(name: str) -> str:
    """The name of a part of a draft layer within the layer: ``self_attn.q_proj``."""
    found = _NUMBER.match(name)
    return name if found is None else name[found.end() :]


def block_count(config: Mapping[str, Any]) -> int | None:
    """The number of decoder blocks that config.json states; None if it states none."""
    for part in (config.get("text_config"), config):
        count = part.get("num_hidden_layers") if isinstance(part, Mapping) else None
        if isinstance(count, int):
            return count
    return None


def announced(config: Mapping[str, Any]) -> int:
    """The number of draft layers that config.json announces; 0 if it announces none."""
    parts = [part for part in (config.get("text_config"), config) if isinstance(part, Mapping)]
    counts = [part.get(key) for part in parts for key in COUNTS]
    return max((count for count in counts if isinstance(count, int)), default=0)


def without_count(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with 0 for each number of draft layers that it states."""
    plain = {key: 0 if key in COUNTS else value for key, value in config.items()}
    text = plain.get("text_config")
    if isinstance(text, Mapping):
        plain["text_config"] = {key: 0 if key in COUNTS else v for key, v in text.items()}
    return plain
