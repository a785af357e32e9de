"""The user's own defaults of options: of a file, and of environment variables, which win."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qplug.errors import QplugError, did_you_mean
from qplug.files.regular import read_text

_MOST_BYTES = 1 << 16  # of the file
#: The commands to whose option of this name a default applies.
_COMMANDS = {
    "device": ("quantize", "eval", "compare", "report", "verify"),
    "backend": ("quantize",),
    "dataset": ("quantize",),
    "check": ("quantize",),
}


def defaults_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns the file of the user's defaults, which need not exist."""
    # Path.home() raises for a user without a home.
    folder = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111
    return Path(folder) / "qplug.toml"


def default_map(environment: Mapping[str, str] = os.environ) -> dict[str, dict[str, str]]:
    """Returns the user's defaults in click's form: by command, then by option.

    Raises QplugError for a file that is no TOML, or has other keys or values than defaults.
    """
    values = _of_file(defaults_file(environment))
    for key in _COMMANDS:
        if value := environment.get(f"QPLUG_{key.upper()}"):
            values[key] = value
    commands = {command for commands in _COMMANDS.values() for command in commands}
    return {
        command: {key: value for key, value in values.items() if command in _COMMANDS[key]}
        for command in sorted(commands)
    }


def _of_file(file: Path) -> dict[str, str]:
    if not file.parent.is_dir():
        return {}
    try:
        text = read_text(file, _MOST_BYTES)
    except FileNotFoundError:
        return {}
    values = _parsed(text, file)
    for key, value in values.items():
        if key not in _COMMANDS:
            hint = did_you_mean(key, _COMMANDS)
            names = ", ".join(_COMMANDS)
            raise QplugError(f"{file}: unknown key {key!r}.{hint} There are: {names}")
        if not isinstance(value, str):
            raise QplugError(f"{file}: {key} must be a string in quotes")
    return values


def _parsed(text: str, file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib

        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise QplugError(f"{file}: is no TOML: {error}") from error
    raise QplugError(f"{file}: needs Python 3.11; use QPLUG_DEVICE and the like instead")
