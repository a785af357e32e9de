"""Looks up exporters by name, and joins those whose names stand together with a plus."""

from __future__ import annotations

from typing import Any

from qplug.api import Exporter
from qplug.api.joined import PLUS, join
from qplug.registry.offers import Components
from qplug.registry.plugin import Plugin


class Backends(Components[Exporter[Any]]):
    """The exporters that plugins offer, by name; ``vllm+sglang`` is both of them, joined."""

    def owners(self, name: str) -> list[Plugin]:
        """Returns the plugins that offer ``name``, or a part of it if it names several."""
        if PLUS not in name:
            return super().owners(name)
        owners: list[Plugin] = []
        for part in name.split(PLUS):
            owners += [plugin for plugin in super().owners(part) if plugin not in owners]
        return owners

    def get(self, name: str) -> type[Exporter[Any]] | None:
        """Returns the exporter called ``name``, or None if no plugin offers it.

        Raises QplugError as ``Offers.get`` does, or if ``name`` names several that cannot be
        joined, or one that nobody offers.
        """
        if PLUS not in name:
            return super().get(name)
        return join([self[part.strip()] for part in name.split(PLUS)])
