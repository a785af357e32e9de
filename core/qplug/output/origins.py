"""The names of models and files in what is published, and where they are on this machine.

A result says of a local folder only its name: its path tells strangers of a machine. So that
``qplug verify`` still finds the float model, a file of the user's own notes the path, below
``$XDG_STATE_HOME/qplug/origins``, by default ``~/.local/state/qplug/origins``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qplug.checkpoint.locate import DEMO, may_be_on_hub
from qplug.errors import QplugError
from qplug.files.regular import read_text

#: A folder of the Hub's cache: ``models--OWNER--NAME/snapshots/REVISION``.
_CACHED = re.compile(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?$")
#: What the Hub takes as the name of a repository.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: The longest path of a file system, in bytes.
_LONGEST = 1 << 16


def public_name(text: str) -> str:
    """Returns ``text``, or its last part if it is a path on this machine.

    A folder of the Hub's cache has the name of its repository.
    """
    if cached := _CACHED.search(text):
        return f"{cached[1]}/{cached[2]}"
    is_path = text.startswith(("/", "~", "./", "../")) or text in (".", "..")
    if is_path or (os.sep in text and os.path.lexists(text)):
        # A link keeps its name, which Path.resolve would lose.
        return os.path.basename(os.path.abspath(text)) or text  # noqa: PTH100, PTH119
    return text


def public_values(value: Any) -> Any:
    """Returns a plain value for JSON with the ``public_name`` of each text in it."""
    if isinstance(value, str | os.PathLike):
        return public_name(os.fspath(value))
    if isinstance(value, Mapping):
        return {key: public_values(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(own) for own in value]
    return value


def hub_name(model: str, config: Mapping[str, Any]) -> str | None:
    """Returns the repository of ``model`` on the Hub; None if nothing says that it has one.

    It is ``model`` itself, or the one whose cached folder ``model`` is, or the one that
    ``config.json`` names.
    """
    named = config.get("_name_or_path")
    for name in (public_name(model), named if isinstance(named, str) else ""):
        if may_be_on_hub(name) and not os.path.lexists(name) and _REPOSITORY.fullmatch(name):
            return name
    return None


def identity(record: Mapping[str, Any]) -> str:
    """Returns a short text that the content of a ``qplug.json`` has, and hardly another's.

    It depends on the model, the recipe and the error of each layer.
    """
    told = [record.get(key) for key in ("model", "recipe", "layers")]
    text = json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:40]


def remember_origin(record: Mapping[str, Any], model: str) -> None:
    """Notes where ``model``, a path on this machine, is, for the folder with this ``qplug.json``.

    What cannot be noted is not: the note only saves an option of ``qplug verify``.
    """
    if model == DEMO or not Path(model).is_dir():
        return  # it is found by its name
    with suppress(OSError):
        file = _notes() / identity(record)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(Path(model).absolute()), encoding="utf-8")


def find_origin(identity: str) -> Path | None:
    """Returns the folder that ``remember_origin`` noted; None if there is none any more."""
    try:
        path = Path(read_text(_notes() / identity, _LONGEST))
        return path if path.is_dir() else None
    except (OSError, ValueError, QplugError):
        return None


def _notes() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(home) / "qplug" / "origins"
