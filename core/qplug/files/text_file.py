"""Reads a file of text for calibration."""

from __future__ import annotations

from pathlib import Path

from qplug.errors import QplugError
from qplug.files.regular import read_bytes

#: The longest file of text, in bytes. In memory, with its tokens, it takes a few times as much.
MAX_BYTES = 512 << 20


def read_text_file(path: Path) -> str:
    """Returns the text of the file at ``path``, unchanged: for datasets.

    Raises QplugError if there is no such file, if it is not a regular file (such as a pipe), has
    more than ``MAX_BYTES`` bytes, is not UTF-8, or has a zero byte.
    """
    try:
        content = read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        raise QplugError(f"{path}: no such file") from None
    if b"\0" in content:
        raise QplugError(f"{path}: not a text file: it has a zero byte")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise QplugError(f"{path}: not UTF-8, at byte {error.start}: save it as UTF-8") from error
