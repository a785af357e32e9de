"""Turns the MODEL of a command into a folder on this machine."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from qplug.errors import QplugError
from qplug.files.hub_problem import hub_problem

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
    if not may_be_on_hub(model):
        raise QplugError(f"{model}: no such folder")
    return _download(model)


def find_at_hand(model: str) -> Path | None:
    """Returns the folder of ``model`` if it is on this machine, else None. Asks no other host.

    ``model`` is a name that a file gives: the file may be a stranger's, so that the Hub must not
    learn of it. The Hub's cache is on this machine.
    """
    if model == DEMO:
        return find_model(DEMO)
    if os.path.isdir(model):  # noqa: PTH112 - Path.is_dir raises on some names
        return Path(model)
    if not may_be_on_hub(model):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None


def as_word(folder: str | Path) -> str:
    """Returns ``folder`` as a word of a command that no program takes for an option."""
    return f"./{folder}" if str(folder).startswith("-") else str(folder)


def may_be_on_hub(model: str) -> bool:
    """Returns whether ``model`` looks like a Hub id, not like a path."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _download(model: str) -> Path:
    """Returns the folder in the Hub's cache, after downloading the files that qplug reads."""
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
        wanted.append("README.md")  # for the license
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # the HTTP library, and so its exceptions, changed twice
        raise QplugError(
            f"{model}: no folder on this machine, and not downloaded from the Hub: "
            f"{hub_problem(error)}; or pass the path of a folder"
        ) from error
