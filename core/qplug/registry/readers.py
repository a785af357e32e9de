"""The readers of plugins as the rest of qplug calls them: a failure names the plugin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from qplug.api import Reader, StoredTensor
from qplug.files.damage import naming_damage
from qplug.registry.border import blaming
from qplug.registry.offers import Offers
from qplug.registry.plugin import Plugin


class BorderedReader(Reader):
    """The reader ``inner`` of ``plugin``: what it raises or returns by mistake names the plugin."""

    def __init__(self, inner: Reader, plugin: Plugin) -> None:
        self.name = inner.name  # type: ignore[misc]  # a class has the name of one reader
        self._inner, self._plugin = inner, plugin

    def reads(self, config: Mapping[str, Any]) -> bool:
        with self._border("config.json", "reads"):
            return bool(self._inner.reads(config))

    def as_float(
        self, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        where = next((str(tensor.paths[0].parent) for tensor in tensors.values()), "config.json")
        with self._border(where, "as_float"):
            answer = self._inner.as_float(config, tensors)
            if not (isinstance(answer, tuple) and len(answer) == 2):
                raise TypeError("as_float must return a configuration and tensors")
            floats, read = answer
            if not isinstance(floats, Mapping):
                raise TypeError(f"as_float must return a mapping as configuration, not {floats!r}")
            for name, tensor in read.items():
                if not (isinstance(name, str) and isinstance(tensor, StoredTensor)):
                    raise TypeError(f"as_float must return StoredTensors by name, not {tensor!r}")
            return dict(floats), dict(read)

    def describe(self, config: Mapping[str, Any]) -> str:
        with self._border("config.json", "describe"):
            return str(self._inner.describe(config))

    def _border(self, where: str, method: str) -> AbstractContextManager[None]:
        """A context for ``method``: its exceptions name the plugin.

        What qplug's own readers stumble over is the fault of the files at ``where``.
        """
        if self._plugin.ships_with_qplug:
            return naming_damage(where, self.name)
        return blaming(lambda error: self._plugin, self.name, method)


class Sources:
    """The readers of all plugins, in the order of their names; plugins load when it is iterated.

    Of readers of one name qplug's own is taken, or none if several plugins clash.
    """

    def __init__(self, readers: Offers[Reader]) -> None:
        self._readers = readers

    def __iter__(self) -> Iterator[Reader]:
        for name, reader in self._readers.without_clashes().items():
            for plugin in self._readers.owners(name):
                if plugin.offers[self._readers.kind, name] is reader:
                    yield BorderedReader(reader, plugin)
