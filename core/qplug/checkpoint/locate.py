"""Turns the MODEL of a command into a folder on this machine."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from qplug.errors import QplugError

DEMO = "qplug:demo"


def find_model(model: str) -> Path:
    """Returns the folder of ``model``, which is a local folder, ``qplug:demo``, or a Hub id.

    A model on the Hub is downloaded into the Hub's cache. Raises QplugError if there is no such
    folder or model, or if the Hub cannot be reached.
    """
    if model == DEMO:
        return Path(str(files("qplug") / "demo"))
    if os.path.lexists(model):  # unlike Path.exists(), does not raise on a name that is too long
        return Path(model)
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path:
        raise QplugError(f"{model}: no such folder")
    return _download(model)


def _download(model: str) -> Path:
    """Returns the folder in the Hub's cache, after downloading the files that qplug reads."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise QplugError(
            f"{model}: no folder on this machine, and not downloaded from the Hub: {reason}"
        ) from error
