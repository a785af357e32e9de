"""From what the user called MODEL to a folder on this machine."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from qplug.errors import QplugError

DEMO = "qplug:demo"


def find_model(model: str) -> Path:
    """The folder of ``model``: a local folder, ``qplug:demo``, or a Hub id (downloaded).

    Raises QplugError if there is none, or the Hub cannot be reached.
    """
    if model == DEMO:
        return Path(str(files("qplug") / "demo"))
    if os.path.lexists(model):  # unlike exists(), lets a name that is too long pass
        return Path(model)
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path:
        raise QplugError(f"{model}: no such folder")
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise QplugError(
            f"{model}: neither a folder here nor a model the Hub gave ({first})"
        ) from error
