"""The processor of a model: it makes the inputs of a model from text and pictures."""

from __future__ import annotations

from typing import Any

from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import check_companions
from qplug.errors import QplugError
from qplug.model.foreign import reason_of
from qplug.model.quiet import quiet_transformers


def load_processor(model: str, *, trust_remote_code: bool = False) -> Any:
    """The processor of ``model`` (a folder, a Hub id), for text with pictures.

    Raises QplugError if there is none for pictures, or if it does not load.
    """
    from transformers import AutoProcessor

    folder = find_model(model)
    check_companions(folder)
    try:
        with quiet_transformers():
            processor: Any = AutoProcessor.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises anything for a file of wrong content
        raise QplugError(f"{folder}: its processor does not load: {reason_of(error)}") from error
    if getattr(processor, "image_processor", None) is None:
        raise QplugError(f"{folder}: the model takes no pictures: it has no processor for them")
    return processor
