"""A byte-level BPE tokenizer, as llama.cpp is told of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qplug import QplugError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

#: What cuts text up before merging, by its parts, and what llama.cpp calls it.
_CUTTERS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by number, their types, the merges in order, and what llama.cpp calls the cutter."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    cutter: str
    begins: bool


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer in ``folder``, filled up to ``size``. Raises QplugError if it is another."""
    try:
        told = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QplugError("needs a tokenizer.json, and the model has none") from None
    model = told["model"]
    cutter = _CUTTERS.get(tuple(part["type"] for part in _parts(told["pre_tokenizer"])))
    if model["type"] != "BPE" or cutter is None or told["normalizer"] is not None:
        raise QplugError("takes byte-level BPE tokenizers as those of GPT-2 and SmolLM alone")
    tokens, types = [f"[PAD{n}]" for n in range(size)], [_USER_DEFINED] * size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, _NORMAL
    for added in told["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return Vocabulary(tokens, types, merges, cutter, _begins(told["post_processor"]))


def _parts(told: dict[str, Any] | None) -> list[dict[str, Any]]:
    if told is None:
        return []
    parts: list[dict[str, Any]] = told["pretokenizers"] if told["type"] == "Sequence" else [told]
    return parts


def _begins(told: dict[str, Any] | None) -> bool:
    """Whether a special token is put before a text."""
    return bool(
        told and told["type"] == "TemplateProcessing" and "SpecialToken" in told["single"][0]
    )
