"""Reads config.json: the types of what qplug reads in it, and sizes that the weights can have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qplug.api.tensors import StoredTensor
from qplug.errors import QplugError
from qplug.files.json_text import read_json
from qplug.files.typed import Typed

CONFIG = "config.json"

#: Fields that count layers or experts, and fields that are widths. A model of them is built before
#: any weight is read.
_COUNT = re.compile(r"(^|_)n?_?(layers?|experts)$")
_WIDTH = re.compile(r"(^|_)(n_)?(size|dim|heads|embd|embed|inner|rank|width|groups)$")
#: Counts and widths that are built in a moment whatever the weights are.
_MANY, _WIDE = 1000, 1 << 20
#: Elements that can be packed into one that is stored.
_PACKED = 16
#: The fields for the number of experts that each token goes to.
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config.json of ``folder``.

    Raises QplugError if it is missing, is a link out of the folder, is no mapping in JSON, or if a
    field that qplug reads has a wrong type.
    """
    path = folder / CONFIG
    config = read_json(path, within=folder, strict=False)
    typed = Typed(str(path), config)
    if (architectures := typed.get("architectures")) is not None:
        architectures.texts()
    for key in ("model_type", "dtype", "torch_dtype"):
        if (word := typed.get(key)) is not None:
            word.text()
    for key in ("quantization_config", "compression_config"):
        if (quantization := typed.get(key)) is None:
            continue
        if (method := quantization.get("quant_method")) is not None:
            method.text()
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the part of ``config`` on the language model; all of it if there is no such part."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def experts_of_a_token(config: Mapping[str, Any]) -> int | None:
    """Returns the number of experts that each token goes to; None if ``config`` states none."""
    stated = (text_config(config).get(key) for key in _EXPERTS_OF_A_TOKEN)
    return next((n for n in stated if isinstance(n, int) and n > 0), None)


def refuse_absurd(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    """Raises QplugError if ``config``, which is at ``path``, describes no model of ``tensors``.

    It has more layers or experts than there are tensors, or a width beyond any of theirs. The
    module tree of such a model would fill the memory before a tensor is missed.
    """
    count = max(len(tensors), _MANY)
    sides = [side for tensor in tensors.values() for side in tensor.spec.shape]
    width = max(_PACKED * max(sides, default=0), _WIDE)
    for key, value in _numbers(config):
        name = key.rpartition(".")[2]
        if _COUNT.search(name) and abs(value) > max(count, max(sides, default=0)):
            raise QplugError(
                f"{path}: {key} is {value}, but the weights are {len(tensors)} tensors"
            )
        if _WIDTH.search(name) and abs(value) > width:
            raise QplugError(
                f"{path}: {key} is {value}, but the widest tensor here has {max(sides, default=0)}"
            )


def _numbers(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Yields the numbers in ``config`` and in the mappings in it, each with its keys."""
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        for item in values:
            if isinstance(item, Mapping):
                yield from _numbers(item, f"{prefix}{key}.")
            elif type(item) in (int, float):
                yield f"{prefix}{key}", item
