"""Looks up components and commands by name, and names the plugin in every error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from qplug.api import Component
from qplug.api.params import fill
from qplug.errors import PluginError, QplugError, did_you_mean
from qplug.registry.border import blaming
from qplug.registry.plugin import Plugin, same_name

T = TypeVar("T")
C = TypeVar("C", bound=Component[Any])


class Offers(Generic[T]):
    """The offers of one kind, such as ``command``, of all plugins, by name.

    ``load`` is called before each look-up; it makes the plugins state their offers.
    """

    def __init__(
        self, kind: str, plugins: list[Plugin], load: Callable[[], object], word: str = ""
    ) -> None:
        """``word`` is the word for this kind on the command line: ``backend`` for an exporter."""
        self.kind, self._plugins, self._load = kind, plugins, load
        self.word = word or kind

    def owners(self, name: str) -> list[Plugin]:
        """Returns the plugins that offer ``name``; more than one of them is a clash."""
        self._load()
        return [p for p in self._plugins if not p.error and (self.kind, name) in p.offers]

    def clash(self, name: str) -> str | None:
        """Returns a sentence if more than one plugin offers ``name``, else None."""
        owners = self.owners(name)
        if len(owners) <= 1:
            return None
        sources = " and ".join(str(plugin) for plugin in owners)
        strangers = [plugin for plugin in owners if not plugin.ships_with_qplug] or owners
        dropped = " or ".join(f"-p no:{plugin.name}" for plugin in strangers)
        which = "it" if len(strangers) == 1 else "one"
        return f"{self.kind} {name!r} comes from {sources}; drop {which}: {dropped}"

    def __iter__(self) -> Iterator[str]:
        self._load()
        working = (plugin for plugin in self._plugins if not plugin.error)
        names = {name for plugin in working for kind, name in plugin.offers if kind == self.kind}
        return iter(sorted(names))

    def get(self, name: str) -> T | None:
        """Returns the offer called ``name``, or None if no plugin offers it.

        Raises QplugError if several plugins offer ``name``. If no plugin offers it, raises
        QplugError if a plugin that is itself called ``name`` is broken or switched off, or if a
        file that the user passed with ``--plugin`` is broken.
        """
        if sentence := self.clash(name):
            raise QplugError(sentence)
        if owners := self.owners(name):
            offer: T = owners[0].offers[self.kind, name]
            return offer
        for plugin in self._plugins:
            is_namesake = same_name(plugin.name, name)
            if plugin.error and (is_namesake or plugin.is_file):
                raise PluginError(plugin.name, plugin.source, plugin.error) from plugin.error
            if plugin.blocked and is_namesake:
                raise QplugError(f"{self.word} {name!r} is switched off by {plugin.blocked}")
        return None

    def without_clashes(self) -> dict[str, T]:
        """Returns the offers by name; of a name that several plugins offer, qplug's own if any."""
        offers: dict[str, T] = {}
        for name in self:
            owners = self.owners(name)
            own = [plugin for plugin in owners if plugin.ships_with_qplug]
            if len(owners) == 1 or len(own) == 1:
                offers[name] = (own or owners)[0].offers[self.kind, name]
        return offers

    def __getitem__(self, name: str) -> T:
        offer = self.get(name)
        if offer is not None:
            return offer
        names = list(self)
        broken = ", ".join(plugin.name for plugin in self._plugins if plugin.error)
        raise QplugError(
            f"no {self.word} {name!r}.{did_you_mean(name, names)}"
            f" There are: {', '.join(names) or 'none'}."
            + (f" Broken plugins: {broken}; see qplug plugins check" if broken else "")
        )


class Components(Offers[type[C]], Generic[C]):
    """The component classes of one kind that plugins offer, by name."""

    def make(self, name: str, options: Mapping[str, Any] | None = None) -> C:
        """Returns an instance of the component ``name``; ``options`` replace its defaults.

        Raises QplugError if no plugin offers ``name``, if several do, or if an option is unknown
        or has a wrong value.
        """
        return self._made(self[name], options or {})

    def make_own(self, name: str) -> C:
        """Returns an instance of the component ``name`` with its default options.

        If several plugins offer ``name``, the component is qplug's own. Raises QplugError as
        ``make`` does.
        """
        return self._made(self.without_clashes().get(name) or self[name], {})

    def _made(self, component: type[C], options: Mapping[str, Any]) -> C:
        named = self.owners(component.name)
        key = self.kind, component.name
        owner = next((p for p in named if p.offers.get(key) is component), None)
        with blaming(lambda error: owner, component.name, f"{self.word} {component.name}"):
            return component(fill(component.Params, options, f"{self.word} {component.name}"))
