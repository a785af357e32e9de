"""Find plugins, remember what became of each, and answer "which class is NAME?".

Finding plugins reads package metadata and imports none of them. The first question for a component
of any kind imports every plugin and calls all its hooks: only so can two plugins that offer one
name be told, and one that is broken anywhere be left out whole. This may import torch, which
whoever asks for a component is about to need; the rest of the command line never asks. Commands
are asked for apart from components, and need no torch.
"""

from __future__ import annotations

import inspect
import os
import re
import traceback
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pluggy

from qplug.api import Algorithm, Component, Dataset, Engine, Exporter, Format, hookspecs
from qplug.api.params import options
from qplug.errors import QplugError, did_you_mean
from qplug.registry.offers import Components, Offers
from qplug.registry.plugin import Plugin, among, canonical, in_quotes

GROUP = "qplug"


class Registry:
    """The plugins of one run. Make one and pass it on: there is no global."""

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        # One order everywhere. Of plugins that have one name, a file that the user gave is taken,
        # then qplug's own; nothing depends on the order in which packages were installed.
        self.plugins = sorted(
            plugins,
            key=lambda p: (canonical(p.name), not p.is_file, not p.ships_with_qplug, p.source),
        )
        taken: dict[str, Plugin] = {}
        for plugin in self.plugins:
            if plugin.blocked:
                continue
            first = taken.setdefault(canonical(plugin.name), plugin)
            if first is not plugin:
                plugin.error = QplugError(f"the name of this plugin is taken by {first}")
        components = self.plugins, self.load
        self.algorithms = Components[Algorithm[Any]]("algorithm", *components, "algorithm")
        self.datasets = Components[Dataset[Any]]("dataset", *components, "dataset")
        self.exporters = Components[Exporter[Any]]("exporter", *components, "backend")
        self.commands = Offers[click.Command]("command", self.plugins, self.load_commands)

    @classmethod
    def installed(
        cls,
        blocked: Collection[str] = (),
        only_shipped: bool = False,
        files: Iterable[Path] = (),
    ) -> Registry:
        """The installed plugins and those in ``files``; none is imported yet.

        The environment variable QPLUG_PLUGINS names the only ones to use. It and ``only_shipped``
        leave ``files`` in; ``blocked`` does not. Raises QplugError if there is nothing to block.
        """
        named = cache(in_quotes)  # parses metadata: once for each package, not for each plugin
        plugins = [Plugin.of_entry(entry, named) for entry in entry_points(group=GROUP)]
        allowed = os.environ.get("QPLUG_PLUGINS")
        for plugin in plugins:
            if only_shipped and not plugin.ships_with_qplug:
                plugin.blocked = "--no-plugins"
            if allowed is not None and not among(plugin.name, allowed.split(",")):
                plugin.blocked = "QPLUG_PLUGINS"
        plugins += [Plugin.of_file(Path(file)) for file in files]
        names = [plugin.name for plugin in plugins]
        for name in blocked:
            if not among(name, names):
                raise QplugError(f"-p no:{name}: no such plugin.{did_you_mean(name, names)}")
        for plugin in plugins:
            if among(plugin.name, blocked):
                plugin.blocked = f"-p no:{plugin.name}"
        return cls(plugins)

    def with_(self, plugged: object, name: str = "") -> Registry:
        """This registry and one more plugin: a module, or an object whose methods are hooks.

        ``name`` is what it is called in messages; by default as its class or module is.
        """
        kind = plugged if isinstance(plugged, ModuleType) else type(plugged)
        name = name or kind.__name__.rpartition(".")[2].lower().replace("_", "-")
        return Registry([*self.plugins, Plugin.of_object(plugged, name)])

    @property
    def kinds(self) -> list[Offers[Any]]:
        """All that plugins can offer."""
        return [self.algorithms, self.datasets, self.exporters, self.commands]

    def load(self) -> Registry:
        """Take the components of every plugin, once. What breaks stops no other plugin."""
        for plugin in self._usable():
            if plugin.asked:
                continue
            plugin.asked = True
            with _blaming(plugin):
                # Nothing is kept until all is checked: a plugin is taken whole or not at all.
                found: dict[tuple[str, str], type[Component[Any]]] = {}
                for kind, base in _BASES.items():
                    for answer in _answers(getattr(_manager(plugin).hook, f"qplug_{kind}s")):
                        offer = _checked(answer, base)
                        if (kind, offer.name) in found:
                            raise ValueError(f"it offers {kind} {offer.name!r} twice")
                        found[kind, offer.name] = offer
                plugin.offers.update(found)
        return self

    def load_commands(self) -> Registry:
        """Take the commands of every plugin, once. What breaks stops no other plugin."""
        for plugin in self._usable():
            if plugin.asked_for_commands:
                continue
            plugin.asked_for_commands = True
            with _blaming(plugin):
                # Each fills a group of its own: in a shared one the last of a name would win.
                group = click.Group("qplug")
                _manager(plugin).hook.qplug_commands(group=group)
                plugin.offers.update({("command", name): c for name, c in group.commands.items()})
        return self

    def implementing(self, hook: str) -> Iterator[tuple[Plugin, pluggy.HookCaller]]:
        """The plugins that implement ``hook``, each with what calls it alone, by name."""
        for plugin in self._usable():
            with _blaming(plugin):
                _manager(plugin)
            if plugin.manager is not None and not plugin.error:
                call: pluggy.HookCaller = getattr(plugin.manager.hook, hook)
                if call.get_hookimpls():
                    yield plugin, call

    def blame(self, error: BaseException) -> Plugin | None:
        """The plugin whose code ``error`` passed through: the innermost, if there are several."""
        packages = {plugin.module.partition(".")[0]: plugin for plugin in self._usable()}
        packages.pop("qplug", None)
        found = None
        for frame, _ in traceback.walk_tb(error.__traceback__):
            package = str(frame.f_globals.get("__name__")).partition(".")[0]
            found = packages.get(package, found)
        return found

    def _usable(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.status == "ok"]


_BASES: dict[str, type[Component[Any]]] = {
    "algorithm": Algorithm,
    "dataset": Dataset,
    "exporter": Exporter,
}


@contextmanager
def _blaming(plugin: Plugin) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anything at all, also the SystemExit of a script
        plugin.error = error


def _manager(plugin: Plugin) -> pluggy.PluginManager:
    # A manager for each plugin: every call is then one plugin's, so that an answer or a failure
    # has an owner, and no plugin can wrap the hooks of another.
    if plugin.manager is None:
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(hookspecs)
        plugged = plugin.open()
        manager.register(plugged, plugin.name)
        manager.check_pending()
        if not manager.get_hookcallers(plugged):
            raise TypeError(f"{plugin.module} implements no hook; is @hookimpl missing?")
        if os.environ.get("QPLUG_TRACE", "0") not in ("", "0"):
            manager.add_hookcall_monitoring(lambda *_: None, partial(_trace, plugin))
        plugin.manager = manager
    return plugin.manager


def _trace(
    plugin: Plugin,
    outcome: pluggy.Result[Any],
    hook: str,
    implementations: Collection[object],
    arguments: Any,
) -> None:
    if implementations:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        answer = f"raised {outcome.exception!r}" if outcome.exception else outcome.get_result()
        click.echo(f"{hook}({given}): {plugin}: {answer}", err=True)


def _answers(hook: pluggy.HookCaller) -> Iterator[object]:
    # pluggy leaves None out: what an implementation that forgot its return gives.
    results = hook() or [None] * len(hook.get_hookimpls())
    for result in results:
        if not isinstance(result, Iterable):
            raise TypeError(f"{hook.name} must return classes in a list, not {result!r}")
        yield from result


def _checked(offer: object, base: type[Component[Any]]) -> type[Component[Any]]:
    if not (isinstance(offer, type) and issubclass(offer, base)):
        raise TypeError(f"{offer!r} is not a subclass of qplug.{base.__name__}")
    where = offer.__qualname__
    if inspect.isabstract(offer):
        raise TypeError(f"{where} does not define: {', '.join(sorted(offer.__abstractmethods__))}")
    name = getattr(offer, "name", None)
    if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9-]*", name)):
        raise ValueError(f"{where}.name must be lower case, digits and hyphens, not {name!r}")
    if not (offer.__doc__ or "").strip():
        raise ValueError(f"{where} needs a docstring: users read its first line")
    options(offer.Params)
    if issubclass(offer, Exporter):
        _check_parts(offer)
    return offer


def _check_parts(offer: type[Exporter[Any]]) -> None:
    if not isinstance(getattr(offer, "format", None), Format):
        raise TypeError(f"{offer.__qualname__}.format must be an object of a subclass of Format")
    if not isinstance(offer.engine, Engine | None):
        raise TypeError(
            f"{offer.__qualname__}.engine must be an object of a subclass of Engine, or None"
        )
