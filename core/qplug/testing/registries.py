"""Registries that hold what a test gives them, whatever is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qplug.api import Algorithm, Component, Dataset, NoParams, Split
from qplug.api.hookspecs import hookimpl
from qplug.registry.plugin import Plugin
from qplug.registry.registry import Registry


class KitText(Dataset[NoParams]):
    """A few lines to calibrate on, in no time."""

    name = "kit-text"

    def documents(self, split: Split) -> Iterator[str]:
        return iter([f"Line {number} of the text for {split}." for number in range(50)])


def bare_registry(*plugged: object) -> Registry:
    """A registry that discovers nothing: it has the given plugins, modules or objects, alone."""
    registry = Registry([])
    for number, each in enumerate(plugged):
        registry = registry.with_(each, f"plugin-{number}")
    return registry


def registry_with(*kinds: type[Component[Any]]) -> Registry:
    """What ships with qplug, KitText, and ``kinds`` in the place of any of the same name."""
    shipped = Registry.installed(only_shipped=True)
    kept: list[Plugin] = []
    for plugin in shipped.load().plugins:
        if not any(_offers(plugin, kind) for kind in kinds):
            kept.append(plugin)
    return Registry(kept).with_(Offering(*kinds, KitText), "under-test")


def _offers(plugin: Plugin, kind: type[Component[Any]]) -> bool:
    return (_hook_of(kind), kind.name) in plugin.offers


def _hook_of(kind: type[Component[Any]]) -> str:
    if issubclass(kind, Algorithm):
        return "algorithm"
    return "dataset" if issubclass(kind, Dataset) else "exporter"


class Offering:
    """A plugin that offers components that are at hand."""

    def __init__(self, *kinds: type[Component[Any]]) -> None:
        self._kinds = kinds

    def _of(self, wanted: str) -> list[Any]:
        return [kind for kind in self._kinds if _hook_of(kind) == wanted]

    @hookimpl
    def qplug_algorithms(self) -> list[Any]:
        return self._of("algorithm")

    @hookimpl
    def qplug_datasets(self) -> list[Any]:
        return self._of("dataset")

    @hookimpl
    def qplug_exporters(self) -> list[Any]:
        return self._of("exporter")
