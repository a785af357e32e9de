"""Reads a checkpoint that somebody quantized as the float checkpoint that it stands for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qplug.api import Checkpoint, Reader
from qplug.errors import QplugError


def read_as_float(checkpoint: Checkpoint, readers: Iterable[Reader]) -> Checkpoint:
    """Returns ``checkpoint`` as the reader for its format reads it; as it is if there is none.

    Raises QplugError if several readers read its format, or if the checkpoint is broken.
    """
    fitting = [reader for reader in readers if reader.reads(checkpoint.config)]
    if not fitting:
        return checkpoint
    if len(fitting) > 1:
        names = " and ".join(reader.name for reader in fitting)
        raise QplugError(
            f"{checkpoint.folder}: the readers {names} all read it; switch one off: -p no:PLUGIN"
        )
    (reader,) = fitting
    config, tensors = reader.as_float(checkpoint.config, checkpoint.tensors)
    words = reader.describe(checkpoint.config)
    return replace(checkpoint, config=dict(config), tensors=dict(tensors), quantized=words)
