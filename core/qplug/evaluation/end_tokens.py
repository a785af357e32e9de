"""The tokens at which a model stops writing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qplug.files.json_text import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE = "generation_config.json"


def end_tokens(folder: Path, net: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that end a text of ``net``, which was loaded from ``folder``.

    Models for chats often name the token that ends an answer in generation_config.json alone, which
    a model that is made of tensors does not read.
    """
    stored = read_json(folder / _FILE, strict=False) if (folder / _FILE).exists() else {}
    named = (
        stored.get("eos_token_id"),
        net.generation_config.eos_token_id if net.generation_config else None,
        tokenizer.eos_token_id,
    )
    ends: set[int] = set()
    for tokens in named:
        several = tokens if isinstance(tokens, list) else [tokens]
        ends.update(token for token in several if isinstance(token, int))
    return ends
