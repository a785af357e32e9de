"""``qplug plugins``: lists, checks, describes and creates plugins."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qplug.api import Reader
from qplug.api.params import Option, options
from qplug.cli.choice import Choice
from qplug.cli.printed_table import print_table
from qplug.cli.printing import SETTINGS, Command, say, say_json, say_text
from qplug.errors import PluginError, QplugError, did_you_mean, reason
from qplug.registry.outline import outline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qplug.registry.plugin import Plugin
    from qplug.registry.registry import Registry
    from qplug.registry.scaffold import Kind


@click.group(name="plugins", context_settings=SETTINGS)
def command() -> None:
    """List, check, describe and create plugins."""


@command.command(name="list", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_(registry: Registry, as_json: bool) -> None:
    """List the offers of installed plugins: kind, name, plugin and one line. Imports no plugin."""
    if as_json:
        rows = [
            {
                "name": p.name,
                "source": p.source,
                "module": p.module,
                "unused": _unused(p),
                "offers": [dataclasses.asdict(offer) for offer in outline(p)],
            }
            for p in registry.plugins
        ]
        say_json(rows)
    else:
        rows_of = (row for plugin in registry.plugins for row in _outlined(plugin))
        print_table(sorted(rows_of, key=lambda row: _ORDER.index(row[0])))


@command.command(cls=Command)
@click.pass_context
def check(ctx: click.Context) -> None:
    """Import every plugin and print its offers. Fails if a plugin is broken or two clash."""
    registry: Registry = ctx.obj
    registry.load().load_commands()
    print_table(
        [
            [
                plugin.status,
                plugin.name,
                plugin.source,
                _unused(plugin) or _offers(plugin),
            ]
            for plugin in registry.plugins
        ]
    )
    clashes = list(_clashes(registry, ctx.find_root().command))
    for sentence in clashes:
        say(f"clash  {sentence}")
    if clashes or any(plugin.error for plugin in registry.plugins):
        ctx.exit(1)


@command.command(cls=Command)
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def show(registry: Registry, name: str, as_json: bool) -> None:
    """Describe the component or command NAME: its plugin, its purpose and its parameters."""
    descriptions = [
        _description(offers.kind, name, plugin)
        for offers in registry.kinds
        for plugin in offers.owners(name)
    ]
    if not descriptions:
        _explain_absence(registry, name)
    if as_json:
        say_json(descriptions)
    else:
        say_text("\n\n".join(_prose(description) for description in descriptions))


@command.command(cls=Command)
@click.argument("name")
@click.option(
    "--kind",
    required=True,
    type=Choice(["algorithm", "dataset", "exporter", "command", "hook", "architecture"]),
    help="What the plugin offers.",
)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="The folder to create; default: qplug-NAME."
)
@click.pass_obj
def new(registry: Registry, name: str, kind: Kind, folder: Path | None) -> None:
    """Write a package with a working plugin and its tests, as a start for your own."""
    from qplug import __version__
    from qplug.registry.scaffold import write_plugin

    written = write_plugin(name, kind, folder or Path(f"qplug-{name}"), registry, __version__)
    say(f"{written}: written. Next: pip install -e '{written}[test]' && pytest {written}")


#: The order of kinds in a list; "-" stands for a plugin whose source names no offer.
_ORDER = ("algorithm", "dataset", "exporter", "reader", "command", "-")


def _outlined(plugin: Plugin) -> list[list[str]]:
    """Returns a row for each offer of ``plugin``: kind, name, plugin, package, and one line."""
    unused = _unused(plugin)
    offers = [] if plugin.error else outline(plugin)
    rows = [[o.kind, o.name, plugin.name, plugin.source, unused or o.summary] for o in offers]
    return rows or [["-", "-", plugin.name, plugin.source, unused or ""]]


def _unused(plugin: Plugin) -> str | None:
    """Returns why ``plugin`` is not used, None if it is."""
    if plugin.blocked:
        return f"switched off by {plugin.blocked}"
    if plugin.error:
        return " ".join(reason(plugin.error).splitlines())
    return None


def _offers(plugin: Plugin) -> str:
    """Returns the offers of ``plugin``, and the hooks that it implements without an offer."""
    offers = [f"{kind} {name}" for kind, name in plugin.offers]
    slow = f" ({plugin.import_time})" if plugin.is_slow else ""
    return ", ".join([*offers, *plugin.takes_part]) + slow


def _clashes(registry: Registry, root: click.Command) -> Iterator[str]:
    """Yields a sentence for each name that several plugins, or a plugin and qplug, offer."""
    for offers in registry.kinds:
        for name in offers:
            if sentence := offers.clash(name):
                yield sentence
    own = root.commands if isinstance(root, click.Group) else ()
    for name in registry.commands:
        if name in own:
            for plugin in registry.commands.owners(name):
                yield f"command {name!r} of {plugin} is never run: qplug has a command {name!r}"


def _description(kind: str, name: str, plugin: Plugin) -> dict[str, Any]:
    """Returns the facts about an offer, for JSON."""
    offer = plugin.offers[kind, name]
    is_command = isinstance(offer, click.Command)
    has_options = not isinstance(offer, click.Command | Reader)
    return {
        "kind": kind,
        "name": name,
        "plugin": plugin.name,
        "source": plugin.source,
        "description": inspect.cleandoc((offer.help if is_command else offer.__doc__) or ""),
        "parameters": [_parameter(o) for o in options(offer.Params)] if has_options else [],
    }


def _parameter(option: Option) -> dict[str, Any]:
    return {
        "name": option.name,
        "type": option.type_name,
        "required": option.required,
        "default": None if option.required else option.default,
        "help": option.param.help,
        "older_names": list(option.param.also),
    }


def _explain_absence(registry: Registry, name: str) -> None:
    """Raises the error for a NAME that no plugin offers."""
    for plugin in registry.plugins:
        if plugin.name == name and plugin.error:
            raise PluginError(plugin.name, plugin.source, plugin.error) from plugin.error
        if plugin.name == name and plugin.blocked:
            raise QplugError(f"plugin {name} offers nothing: the plugin is {_unused(plugin)}")
        if plugin.name == name:
            raise QplugError(f"plugin {name} offers: {_offers(plugin) or 'nothing'}")
    names = sorted({name for offers in registry.kinds for name in offers})
    hint = did_you_mean(name, names)
    raise QplugError(f"nothing is called {name!r}.{hint} There are: {', '.join(names) or 'none'}")


def _prose(description: dict[str, Any]) -> str:
    """Formats a description for people."""
    lines = [
        f"{description['kind']} {description['name']}",
        f"from plugin {description['plugin']} ({description['source']})",
        "",
        description["description"],
    ]
    for parameter in description["parameters"]:
        value = "none" if parameter["default"] is None else parameter["default"]
        default = "required" if parameter["required"] else f"default: {value}"
        lines += ["", f"  {parameter['name']}  {parameter['type']}  [{default}]"]
        lines += [f"      {parameter['help']}"]
        if parameter["older_names"]:
            lines += [f"      Older names: {', '.join(parameter['older_names'])}."]
    return "\n".join(lines)
