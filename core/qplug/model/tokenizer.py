"""The tokenizer of a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qplug.checkpoint.locate import find_model
from qplug.errors import QplugError
from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model`` (a folder, a Hub id, ``qplug:demo``), for texts of any length.

    Raises QplugError if the tokenizer does not load.
    """
    from transformers import AutoTokenizer

    folder = find_model(model)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, model_max_length=sys.maxsize
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise QplugError(f"{folder}: its tokenizer does not load: {reason}") from error
    return tokenizer
