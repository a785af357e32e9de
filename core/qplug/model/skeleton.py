"""The hollow model of a checkpoint and its names on disk, made once for all who ask in a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qplug.model.disk_names import DiskNames, disk_names
from qplug.model.hollow import build, load_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Skeleton:
    """The hollow model of the checkpoint in ``folder``.

    The model is built when it is asked for. Methods raise QplugError if its architecture is
    unknown, or if it cannot be built.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self._folder, self._trusted = folder, trust_remote_code
        self._model: PreTrainedModel | None = None
        self._names: tuple[frozenset[str], DiskNames] | None = None

    def model(self) -> PreTrainedModel:
        """Returns the model, which the caller leaves as it is."""
        if self._model is None:
            config = load_config(self._folder, trust_remote_code=self._trusted)
            self._model = build(config, self._folder, trust_remote_code=self._trusted)
        return self._model

    def take(self) -> PreTrainedModel:
        """Returns the model for a caller that changes it; a later call builds another one."""
        model, self._model = self.model(), None
        return model

    def names(self, stored: Iterable[str]) -> DiskNames:
        """Returns ``disk_names`` of the model for a checkpoint with the tensors ``stored``."""
        given = frozenset(stored)
        if self._names is None or self._names[0] != given:
            self._names = given, disk_names(self.model(), given)
        return self._names[1]
