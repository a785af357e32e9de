"""What plugins offer under names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from qplug.api import Component
from qplug.api.params import fill
from qplug.errors import PluginError, QplugError, did_you_mean
from qplug.registry.plugin import Plugin, _same

T = TypeVar("T")
C = TypeVar("C", bound=Component[Any])


class Offers(Generic[T]):
    """What the plugins offer of one kind, by name."""

    def __init__(self, kind: str, plugins: list[Plugin], load: Callable[[], object]) -> None:
        self.kind, self._plugins, self._load = kind, plugins, load

    def owners(self, name: str) -> list[Plugin]:
        """The plugins that offer ``name``: more than one is a clash."""
        self._load()
        return [p for p in self._plugins if not p.error and (self.kind, name) in p.offers]

    def clash(self, name: str) -> str | None:
        """A sentence, if more than one plugin offers ``name``."""
        owners = self.owners(name)
        if len(owners) <= 1:
            return None
        sources = " and ".join(str(plugin) for plugin in owners)
        return f"{self.kind} {name!r} comes from {sources}; drop one: -p no:PLUGIN"

    def __iter__(self) -> Iterator[str]:
        self._load()
        names = {n for p in self._plugins if not p.error for k, n in p.offers if k == self.kind}
        return iter(sorted(names))

    def get(self, name: str) -> T | None:
        """What is called ``name``, or None if no plugin has to do with it.

        Raises QplugError if more than one offers it, and if a plugin that is called so, or a file
        that the user gave, does not work or is switched off.
        """
        if sentence := self.clash(name):
            raise QplugError(sentence)
        if owners := self.owners(name):
            offer: T = owners[0].offers[self.kind, name]
            return offer
        for plugin in self._plugins:
            named = _same(plugin.name, name)
            if plugin.error and (named or plugin.is_file):
                raise PluginError(plugin.name, plugin.source, plugin.error) from plugin.error
            if plugin.blocked and named:
                raise QplugError(f"{self.kind} {name!r} is switched off by {plugin.blocked}")
        return None

    def __getitem__(self, name: str) -> T:
        offer = self.get(name)
        if offer is not None:
            return offer
        names = list(self)
        broken = ", ".join(plugin.name for plugin in self._plugins if plugin.error)
        raise QplugError(
            f"no {self.kind} {name!r}.{did_you_mean(name, names)}"
            f" There are: {', '.join(names) or 'none'}."
            + (f" Broken plugins: {broken}; see qplug plugins check" if broken else "")
        )


class Components(Offers[type[C]], Generic[C]):
    """The components that the plugins offer of one kind, by name.

    ``word`` is what the command line calls one: an exporter is a backend.
    """

    def __init__(
        self, kind: str, plugins: list[Plugin], load: Callable[[], object], word: str
    ) -> None:
        super().__init__(kind, plugins, load)
        self._word = word

    def make(self, name: str, options: Mapping[str, Any] | None = None) -> C:
        """The component called ``name``, with ``options`` in place of defaults.

        Raises QplugError if no plugin offers it, or an option is wrong.
        """
        kind = self[name]
        return kind(fill(kind.Params, options or {}, f"{self._word} {name}"))
