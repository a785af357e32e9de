"""Every hook of qplug. ``hookimpl`` marks an implementation; a plugin imports it from ``qplug``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from qplug.api import Algorithm, Dataset, Exporter

hookspec = pluggy.HookspecMarker("qplug")
hookimpl = pluggy.HookimplMarker("qplug")


@hookspec
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    """Offer quantization algorithms.

    Called once, when the first component of any kind is asked for. Return classes, not instances.

    Since 0.1. Example::

        @hookimpl
        def qplug_algorithms():
            from qplug_mine.mine import Mine

            return [Mine]
    """
    return ()


@hookspec
def qplug_datasets() -> Iterable[type[Dataset[Any]]]:
    """Offer text to calibrate and evaluate on.

    Called once, when the first component of any kind is asked for. Return classes, not instances.

    Since 0.1. Example::

        @hookimpl
        def qplug_datasets():
            from qplug_mine.letters import Letters

            return [Letters]
    """
    return ()


@hookspec
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    """Offer formats that engines load.

    Called once, when the first component of any kind is asked for. Return classes, not instances.

    Since 0.1. Example::

        @hookimpl
        def qplug_exporters():
            from qplug_mine.engine import MyEngine

            return [MyEngine]
    """
    return ()


@hookspec
def qplug_commands(group: click.Group) -> None:
    """Add commands to the command line.

    Called once, when a command is asked for that is not qplug's own, or plugins are checked.

    Since 0.1. Example::

        @hookimpl
        def qplug_commands(group):
            @group.command()
            def hello():
                click.echo("hello")
    """
