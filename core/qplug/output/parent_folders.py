"""Makes the folders above OUT, and removes them again if nothing was written into them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qplug.errors import QplugError
from qplug.output.disk import sync_folder


@contextmanager
def parent_folders(out: Path) -> Iterator[None]:
    """A context with the parent folders of ``out``; the missing ones are made.

    On leaving, the made folders that are empty are removed. Raises QplugError if a folder cannot be
    made.
    """
    created: list[Path] = []
    try:
        for parent in (*reversed(out.absolute().parents[:-1]), out.absolute().parent):
            if not parent.is_dir():
                _make(parent)
                created.append(parent)
        yield
    finally:
        for parent in reversed(created):
            with suppress(OSError):  # the folder is not empty
                parent.rmdir()


def _make(folder: Path) -> None:
    if os.path.lexists(folder):
        raise QplugError(f"{folder}: is not a folder to write into")
    try:
        folder.mkdir()
        sync_folder(folder.parent)
    except OSError as error:
        raise QplugError(f"{folder}: cannot be created: {error.strerror}") from error
