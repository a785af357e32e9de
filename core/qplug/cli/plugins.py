"""``qplug plugins``: what is installed, whether it works, and what can be set."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qplug.api.params import Option, options
from qplug.cli.printed_table import print_table
from qplug.errors import PluginError, QplugError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qplug.registry.plugin import Plugin
    from qplug.registry.registry import Registry
    from qplug.registry.scaffold import Kind


@click.group(name="plugins")
def command() -> None:
    """List, check and describe plugins."""


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_(registry: Registry, as_json: bool) -> None:
    """List the installed plugins. Imports none of them."""
    if as_json:
        rows = [
            {"name": p.name, "source": p.source, "module": p.module, "unused": _unused(p)}
            for p in registry.plugins
        ]
        click.echo(json.dumps(rows, indent=2))
    else:
        print_table([[p.name, p.source, p.module, _unused(p) or ""] for p in registry.plugins])


@command.command()
@click.pass_context
def check(ctx: click.Context) -> None:
    """Import every plugin, and say what each offers. Fails if one is broken or two clash."""
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
        click.echo(f"clash  {sentence}")
    if clashes or any(plugin.error for plugin in registry.plugins):
        ctx.exit(1)


@command.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def show(registry: Registry, name: str, as_json: bool) -> None:
    """Describe what is called NAME: where it comes from, what it does and its parameters."""
    found = [
        _description(offers.kind, name, plugin)
        for offers in registry.kinds
        for plugin in offers.owners(name)
    ]
    if not found:
        _explain_absence(registry, name)
    if as_json:
        click.echo(json.dumps(found, indent=2, default=str))
    else:
        click.echo("\n\n".join(_prose(description) for description in found))


@command.command()
@click.argument("name")
@click.option(
    "--kind",
    required=True,
    type=click.Choice(["algorithm", "dataset", "exporter"]),
    help="What it offers.",
)
@click.option("--folder", type=click.Path(path_type=Path), help="A new one; default: qplug-NAME.")
@click.pass_obj
def new(registry: Registry, name: str, kind: Kind, folder: Path | None) -> None:
    """Write a package with a plugin that works, and with its tests, to change into your own."""
    from qplug import __version__
    from qplug.registry.scaffold import write_plugin

    written = write_plugin(name, kind, folder or Path(f"qplug-{name}"), registry, __version__)
    click.echo(f"{written}: written. Next: pip install -e '{written}[test]' && pytest {written}")


def _unused(plugin: Plugin) -> str | None:
    if plugin.blocked:
        return f"switched off by {plugin.blocked}"
    if plugin.error:
        return " ".join(f"{type(plugin.error).__name__}: {plugin.error}".splitlines())
    return None


def _offers(plugin: Plugin) -> str:
    """What it offers, and the hooks by which it takes part in other ways."""
    offers = [f"{kind} {name}" for kind, name in plugin.offers]
    return ", ".join([*offers, *plugin.takes_part])


def _clashes(registry: Registry, root: click.Command) -> Iterator[str]:
    for offers in registry.kinds:
        for name in offers:
            if sentence := offers.clash(name):
                yield sentence
    own = root.commands if isinstance(root, click.Group) else ()
    for name in registry.commands:
        if name in own:
            for plugin in registry.commands.owners(name):
                yield f"command {name!r} of {plugin} is never run: qplug has one of that name"


def _description(kind: str, name: str, plugin: Plugin) -> dict[str, Any]:
    offer = plugin.offers[kind, name]
    is_command = isinstance(offer, click.Command)
    return {
        "kind": kind,
        "name": name,
        "plugin": plugin.name,
        "source": plugin.source,
        "description": inspect.cleandoc((offer.help if is_command else offer.__doc__) or ""),
        "parameters": [] if is_command else [_parameter(o) for o in options(offer.Params)],
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
    for plugin in registry.plugins:
        if plugin.name == name and plugin.error:
            raise PluginError(plugin.name, plugin.source, plugin.error) from plugin.error
        if plugin.name == name and plugin.blocked:
            raise QplugError(f"plugin {name} offers nothing: it is {_unused(plugin)}")
        if plugin.name == name:
            raise QplugError(f"plugin {name} offers: {_offers(plugin) or 'nothing'}")
    names = sorted({name for offers in registry.kinds for name in offers})
    hint = did_you_mean(name, names)
    raise QplugError(f"nothing is called {name!r}.{hint} There are: {', '.join(names) or 'none'}")


def _prose(description: dict[str, Any]) -> str:
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
            lines += [f"      Also called: {', '.join(parameter['older_names'])}."]
    return "\n".join(lines)
