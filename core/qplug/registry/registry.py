"""Finds plugins, keeps the error of each broken one, and answers "which class is NAME?".

Finding plugins reads package metadata and imports no plugin. The first look-up of a component, of
any kind, imports every plugin and calls all its component hooks. Only then is it known whether two
plugins offer the same name, and a plugin with any broken hook can be left out as a whole. This may
import torch, which the caller is about to need anyway; commands that work without components never
pay for it. Commands of plugins are collected separately from components, without torch.
"""

from __future__ import annotations

import inspect
import os
import re
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import EntryPoint, distributions, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pluggy

from qplug.api import Algorithm, Component, Dataset, Engine, Exporter, Format, Reader, hookspecs
from qplug.api.params import options
from qplug.errors import PluginWarning, QplugError, StageError, did_you_mean, shown
from qplug.registry.backends import Backends
from qplug.registry.border import blaming, keeping_error
from qplug.registry.offers import Components, Offers
from qplug.registry.plugin import Plugin, canonical, describe_package, is_listed
from qplug.registry.readers import Sources

GROUP = "qplug"

#: The kinds of components.
KINDS = ("algorithm", "dataset", "exporter", "reader")


class Registry:
    """The plugins of one run. Create it once and pass it on: there is no global registry."""

    def __init__(self, plugins: Iterable[Plugin], kinds: Collection[str] = KINDS) -> None:
        """``kinds`` are the kinds of components that plugins are asked for."""
        # One order everywhere. Among plugins of the same name a file that the user passed comes
        # first, then qplug's own; the order in which packages were installed does not matter.
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
        self._kinds = kinds
        offering = self.plugins, self.load
        self.algorithms = Components[Algorithm[Any]]("algorithm", *offering, "algorithm")
        self.datasets = Components[Dataset[Any]]("dataset", *offering, "dataset")
        self.exporters = Backends("exporter", *offering, "backend")
        self.readers = Offers[Reader]("reader", *offering)
        self.commands = Offers[click.Command]("command", self.plugins, self.load_commands)

    @classmethod
    def installed(
        cls,
        blocked: Collection[str] = (),
        only_shipped: bool = False,
        files: Iterable[Path] = (),
    ) -> Registry:
        """Returns a registry of the installed plugins and ``files``, without importing any.

        ``blocked`` are names of plugins to switch off. ``only_shipped`` switches off installed
        plugins that do not come with qplug. The environment variable QPLUG_PLUGINS, names with
        commas between them, switches off all other installed plugins. Only ``blocked`` applies to
        ``files`` too. Raises QplugError if a name in ``blocked`` is no plugin's.
        """
        # Parsing metadata is slow: once for a package, not for each of its plugins.
        describe = cache(describe_package)
        entries, plugins = _entries()
        plugins += [Plugin.of_entry(entry, describe) for entry in entries]
        allowed = os.environ.get("QPLUG_PLUGINS")
        for plugin in plugins:
            if only_shipped and not plugin.ships_with_qplug:
                plugin.blocked = "--no-plugins"
            if allowed is not None and not is_listed(plugin.name, allowed.split(",")):
                plugin.blocked = "QPLUG_PLUGINS"
        plugins += [Plugin.of_file(Path(file)) for file in files]
        names = [plugin.name for plugin in plugins]
        for name in blocked:
            if not is_listed(name, names):
                raise QplugError(f"-p no:{name}: no such plugin.{did_you_mean(name, names)}")
        for plugin in plugins:
            if is_listed(plugin.name, blocked):
                plugin.blocked = f"-p no:{plugin.name}"
        return cls(plugins)

    def with_(self, plugged: object, name: str = "") -> Registry:
        """Returns a new registry with one more plugin: a module, or an object with hook methods.

        ``name`` is the plugin's name in messages; by default the name of its module or class.
        """
        definition = plugged if isinstance(plugged, ModuleType) else type(plugged)
        name = name or definition.__name__.rpartition(".")[2].lower().replace("_", "-")
        return Registry([*self.plugins, Plugin.of_object(plugged, name)])

    def only(self, *kinds: str) -> Registry:
        """Returns a registry of the same plugins, which asks them for offers of ``kinds`` alone.

        Backends and readers import no torch, so that a command that needs no others is fast. A
        plugin is not left out here if an offer of another kind is broken.
        """
        plugins = [replace(plugin, offers={}, asked=False) for plugin in self.plugins]
        return Registry(plugins, kinds)

    @property
    def sources(self) -> Sources:
        """The readers of checkpoints that somebody quantized, for ``open_checkpoint``."""
        return Sources(self.readers)

    def backend_of(self, method: object) -> str | None:
        """Returns the name of an exporter whose format has the ``quant_method`` of a folder.

        Of exporters that share the format, the one that is called like it has no engine's limits.
        None if there is none.
        """
        offers = self.exporters.without_clashes()
        fitting = [name for name in offers if offers[name].format.quant_method == method]
        if method is None or not fitting:
            return None
        return method if isinstance(method, str) and method in fitting else fitting[0]

    @property
    def kinds(self) -> list[Offers[Any]]:
        """The look-ups of everything that plugins can offer."""
        return [self.algorithms, self.datasets, self.exporters, self.readers, self.commands]

    def load(self) -> Registry:
        """Collects the components of every plugin, once, and returns this registry.

        A plugin that fails keeps its error and is left out; the others are not affected.
        """
        for plugin in self._usable():
            if plugin.asked:
                continue
            plugin.asked = True
            with keeping_error(plugin):
                # Checks all offers before it keeps any: a plugin is used as a whole or not at all.
                components: dict[tuple[str, str], type[Component[Any]] | Reader] = {}
                for kind in self._kinds:
                    checked = _CHECKS[kind]
                    for answer in _answers(getattr(_manager(plugin).hook, f"qplug_{kind}s")):
                        component = checked(answer)
                        if (kind, component.name) in components:
                            raise ValueError(f"it offers {kind} {component.name!r} twice")
                        components[kind, component.name] = component
                plugin.offers.update(components)
            _warn_if_slow(plugin)
        return self

    def load_commands(self) -> Registry:
        """Collects the commands of every plugin, once, and returns this registry.

        A plugin that fails keeps its error and is left out; the others are not affected.
        """
        for plugin in self._usable():
            if plugin.asked_for_commands:
                continue
            plugin.asked_for_commands = True
            with keeping_error(plugin):
                # One group for each plugin: in a shared group, the last command of a name would
                # replace the others without a word.
                group = click.Group("qplug")
                _manager(plugin).hook.qplug_commands(group=group)
                plugin.offers.update({("command", name): c for name, c in group.commands.items()})
            _warn_if_slow(plugin)
        return self

    def implementing(self, hook: str) -> Iterator[tuple[Plugin, pluggy.HookCaller]]:
        """Yields every plugin that implements ``hook``, with the caller of its implementation.

        Plugins come in the order of their names.
        """
        for plugin in self._usable():
            with keeping_error(plugin):
                _manager(plugin)
            _warn_if_slow(plugin)
            if plugin.manager is not None and not plugin.error:
                call: pluggy.HookCaller = getattr(plugin.manager.hook, hook)
                if call.get_hookimpls():
                    yield plugin, call

    def owner(self, component: Component[Any]) -> Plugin | None:
        """Returns the plugin that offers the class of ``component``, None if no plugin does."""
        kind = type(component)
        for plugin in self.plugins:
            if any(offer is kind for offer in plugin.offers.values()):
                return plugin
        return None

    @contextmanager
    def blaming(self, component: Component[Any] | None = None, where: str = "") -> Iterator[None]:
        """A context in which ``component`` works, so that its plugin is named in its errors.

        An exception that the plugin did not mean for the user, such as one that follows from a
        wrong value that the plugin returned, becomes a StageError, ``where`` its place. No plugin
        ends the process: its SystemExit becomes a PluginError. Without ``component`` the plugin is
        the one whose code raised the exception, and other exceptions pass as they are.
        """

        def find(error: BaseException) -> Plugin | None:
            return (component and self.owner(component)) or self.blame(error)

        with blaming(find, component.name if component else "", where):
            yield

    def blame(self, error: BaseException) -> Plugin | None:
        """Returns the plugin that ``error`` names, or whose code it passed through; None if none.

        If ``error`` passed through several plugins, the one nearest to its origin is returned.
        """
        usable = self._usable()
        if isinstance(error, StageError):
            return next((plugin for plugin in usable if plugin.name == error.plugin), None)
        packages = {plugin.module.partition(".")[0]: plugin for plugin in usable}
        packages.pop("qplug", None)
        culprit = None
        for frame, _ in traceback.walk_tb(error.__traceback__):
            package = str(frame.f_globals.get("__name__")).partition(".")[0]
            culprit = packages.get(package, culprit)
        return culprit

    def _usable(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.status == "ok"]


def _entries() -> tuple[list[EntryPoint], list[Plugin]]:
    """Returns the entry points of installed plugins, and a broken plugin for each broken package.

    One package whose list of entry points is malformed would hide the entry points of all others.
    """
    try:
        return list(entry_points(group=GROUP)), []
    except Exception:  # what importlib.metadata raises depends on the Python
        return _entries_of_each()


def _entries_of_each() -> tuple[list[EntryPoint], list[Plugin]]:
    entries: list[EntryPoint] = []
    broken: list[Plugin] = []
    seen: set[str] = set()
    for package in distributions():
        name, source = describe_package(package)
        if name is not None and canonical(name) in seen:
            continue  # Python imports the package that it finds first
        seen.add(canonical(name or ""))
        try:
            entries += package.entry_points.select(group=GROUP)
        except Exception as error:
            broken.append(Plugin(name or source, source, "", error=error, open=object))
    return entries, broken


def _manager(plugin: Plugin) -> pluggy.PluginManager:
    """Returns the plugin's manager; imports the plugin and checks its hooks the first time."""
    # One manager for each plugin: a call reaches that plugin alone, so that the owner of an answer
    # or an error is known, and no plugin can wrap the hooks of another.
    if plugin.manager is None:
        began = time.monotonic()
        plugged = plugin.open()
        plugin.import_seconds = time.monotonic() - began
        manager = _new_manager(plugin, plugged)
        if os.environ.get("QPLUG_TRACE", "0") not in ("", "0"):
            manager.add_hookcall_monitoring(lambda *_: None, partial(_trace, plugin))
        plugin.manager = manager
    return plugin.manager


def _new_manager(plugin: Plugin, plugged: object) -> pluggy.PluginManager:
    """Returns a manager of ``plugged``. Raises what is wrong with its hooks."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugged, plugin.name)
    manager.check_pending()
    if not manager.get_hookcallers(plugged):
        raise TypeError(f"{plugin.module} implements no hook; is @hookimpl missing?")
    return manager


def _warn_if_slow(plugin: Plugin) -> None:
    if plugin.is_slow and not plugin.ships_with_qplug and not plugin.told_slow:
        plugin.told_slow = True
        sentence = f"plugin {plugin}: {plugin.import_time}; -p no:{plugin.name} leaves it out"
        warnings.warn(sentence, PluginWarning, stacklevel=3)


def _trace(
    plugin: Plugin,
    outcome: pluggy.Result[Any],
    hook: str,
    implementations: Collection[object],
    arguments: Any,
) -> None:
    if implementations:
        call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        answer = f"raised {outcome.exception!r}" if outcome.exception else outcome.get_result()
        line = shown(f"{hook}({call}): {plugin}: {answer}")
        click.echo(line, err=True)  # noqa: TID251 - shown above


def _answers(hook: pluggy.HookCaller) -> Iterator[object]:
    """Yields what the implementations of ``hook`` return, which must be lists."""
    # pluggy drops None, which an implementation without a return statement gives.
    results = hook() or [None] * len(hook.get_hookimpls())
    for result in results:
        if not isinstance(result, Iterable):
            raise TypeError(f"{hook.name} must return a list, not {result!r}")
        yield from result


def _checked(offer: object, base: type[Component[Any]]) -> type[Component[Any]]:
    """Returns ``offer`` if it is a complete subclass of ``base``; else raises what is wrong."""
    if not (isinstance(offer, type) and issubclass(offer, base)):
        raise TypeError(f"{offer!r} is not a subclass of qplug.{base.__name__}")
    where = offer.__qualname__
    if inspect.isabstract(offer):
        raise TypeError(f"{where} does not define: {', '.join(sorted(offer.__abstractmethods__))}")
    _check_words(offer, where)
    options(offer.Params)
    if issubclass(offer, Exporter):
        _check_parts(offer)
    return offer


def _checked_reader(offer: object) -> Reader:
    """Returns ``offer`` if it is a reader; else raises what is wrong."""
    if not isinstance(offer, Reader):
        raise TypeError(f"{offer!r} is not an object of a subclass of qplug.Reader")
    _check_words(offer, type(offer).__qualname__)
    return offer


def _check_words(offer: object, where: str) -> None:
    """Raises ValueError if an offer has no name that users can type, or no description."""
    name = getattr(offer, "name", None)
    if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9-]*", name)):
        raise ValueError(f"{where}.name must be lower case, digits and hyphens, not {name!r}")
    if not (offer.__doc__ or "").strip():
        raise ValueError(f"{where} needs a docstring: users read its first line")


def _check_parts(offer: type[Exporter[Any]]) -> None:
    if not isinstance(getattr(offer, "format", None), Format):
        raise TypeError(f"{offer.__qualname__}.format must be an object of a subclass of Format")
    if not isinstance(offer.engine, Engine | None):
        raise TypeError(
            f"{offer.__qualname__}.engine must be an object of a subclass of Engine, or None"
        )


#: By kind of component: returns an answer of a hook that is in order, else raises what is wrong.
_CHECKS: dict[str, Callable[[object], type[Component[Any]] | Reader]] = {
    "algorithm": partial(_checked, base=Algorithm),
    "dataset": partial(_checked, base=Dataset),
    "exporter": partial(_checked, base=Exporter),
    "reader": _checked_reader,
}
