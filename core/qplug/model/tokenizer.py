"""The tokenizer of a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import check_companions
from qplug.errors import QplugError
from qplug.model.foreign import reason_of
from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def import_tokenizers() -> None:
    """Imports the code that tokenizers need, which is most of what models need."""
    from transformers import AutoTokenizer  # noqa: F401


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model`` (a folder, a Hub id, ``qplug:demo``), for texts of any length.

    Raises QplugError if the tokenizer does not load.
    """
    from transformers import AutoTokenizer

    folder = find_model(model)
    check_companions(folder)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, model_max_length=sys.maxsize
            )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library in Rust panics with a BaseException
        raise QplugError(f"{folder}: its tokenizer does not load: {reason_of(error)}") from error
    return tokenizer
