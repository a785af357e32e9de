"""Registries with the plugins that a test passes, whatever plugins are installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qplug.api import Algorithm, Component, Dataset, NoParams, Split
from qplug.api.hookspecs import hookimpl
from qplug.registry.plugin import Plugin
from qplug.registry.registry import Registry


class KitText(Dataset[NoParams]):
    """A few lines of text, for fast calibration in tests."""

    name = "kit-text"

    def documents(self, split: Split) -> Iterator[str]:
        return iter([f"Line {number} of the text for {split}." for number in range(50)])


def bare_registry(*plugged: object) -> Registry:
    """Returns a registry of the given plugins alone; each is a module or an object with hooks."""
    registry = Registry([])
    for number, plugin in enumerate(plugged):
        registry = registry.with_(plugin, f"plugin-{number}")
    return registry


def registry_with(*kinds: type[Component[Any]]) -> Registry:
    """Returns a registry of the components ``kinds``, KitText, and the plugins of qplug.

    A plugin of qplug that offers a component with the name of one in ``kinds`` is left out.
    """
    shipped = Registry.installed(only_shipped=True)
    others: list[Plugin] = []
    for plugin in shipped.load().plugins:
        if not any(_offers(plugin, kind) for kind in kinds):
            others.append(plugin)
    return Registry(others).with_(Offering(*kinds, KitText), "under-test")


def _offers(plugin: Plugin, kind: type[Component[Any]]) -> bool:
    return (_hook_of(kind), kind.name) in plugin.offers


def _hook_of(kind: type[Component[Any]]) -> str:
    if issubclass(kind, Algorithm):
        return "algorithm"
    return "dataset" if issubclass(kind, Dataset) else "exporter"


class Offering:
    """A plugin that offers the given component classes."""

    def __init__(self, *kinds: type[Component[Any]]) -> None:
        self._kinds = kinds

    def _of(self, hook: str) -> list[Any]:
        return [kind for kind in self._kinds if _hook_of(kind) == hook]

    @hookimpl
    def qplug_algorithms(self) -> list[Any]:
        return self._of("algorithm")

    @hookimpl
    def qplug_datasets(self) -> list[Any]:
        return self._of("dataset")

    @hookimpl
    def qplug_exporters(self) -> list[Any]:
        return self._of("exporter")
