"""The command line. What a command needs is imported when it runs, never for ``--help``."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO, cast

import click

from qplug import __version__
from qplug.errors import OtherProcessError, PluginWarning, QplugError
from qplug.machine.launch import Launch
from qplug.registry.registry import Registry

#: Seconds that a process waits for the one that says what is wrong: torchrun ends all as soon as
#: one has ended, and could end that one before its word is out.
_LAST_WORD = 3

#: The commands of qplug itself: where each is, and what ``qplug --help`` says of it.
COMMANDS = {
    "quantize": ("qplug.cli.quantize:command", "Quantize a checkpoint."),
    "eval": ("qplug.cli.eval:command", "Measure the perplexity of a checkpoint."),
    "config": ("qplug.cli.config:command", "Check and convert recipes and LLMC files."),
    "verify": ("qplug.cli.verify:command", "Check that an engine can load a folder."),
    "serve": ("qplug.cli.serve:command", "Verify a folder, and start the engine on it."),
    "inspect": ("qplug.cli.inspect:command", "Say what a quantized folder holds."),
    "report": ("qplug.cli.report:command", "Write a page on a quantized folder."),
    "compare": ("qplug.cli.compare:command", "Put several folders side by side."),
    "schemes": ("qplug.cli.schemes:command", "List schemes, and which engine runs them."),
    "plugins": ("qplug.cli.plugins:command", "List, check and describe plugins."),
}


class Deferred(click.Command):
    """Stands for a command until it is run: ``--help`` lists it without importing its module."""

    def __init__(self, name: str, target: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self.target = target

    def load(self) -> click.Command:
        module, _, attribute = self.target.partition(":")
        return cast("click.Command", getattr(import_module(module), attribute))


class Qplug(click.Group):
    """Prints what the user can mend as one line; lets a bug keep its traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Of several processes the first alone prints; a bug's traceback comes from any."""
        if Launch.of().is_first:
            return super().main(*args, **kwargs)
        try:
            with (
                Path(os.devnull).open("w") as silence,
                redirect_stdout(silence),
                redirect_stderr(silence),
            ):
                return super().main(*args, **kwargs)
        except SystemExit as end:
            if end.code:
                time.sleep(_LAST_WORD)
            raise

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is None and isinstance(ctx.obj, Registry):
            return ctx.obj.commands.get(cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, Deferred) else command, rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            if ctx.obj is None:
                ctx.obj = Registry.installed(
                    blocked=ctx.params["blocked"],
                    only_shipped=ctx.params["no_plugins"],
                    files=ctx.params["files"],
                )
            with _plugin_warnings():
                return super().invoke(ctx)
        except QplugError as error:
            raise click.ClickException(" ".join(str(error).splitlines())) from error
        except OtherProcessError as error:
            click.echo(f"Error: {error}", err=True)
            if Launch.of().is_first:
                time.sleep(_LAST_WORD)
            raise click.exceptions.Exit(1) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            root = error.__cause__ or error  # a StageError is raised from what broke
            plugin = ctx.obj.blame(root) if isinstance(ctx.obj, Registry) else None
            if plugin is not None:
                removable = not (plugin.ships_with_qplug or plugin.is_file)
                hint = f" To do without: qplug --no-plugins, or -p no:{plugin.name}"
                click.echo(f"The error below is from plugin {plugin}.{hint * removable}", err=True)
            raise


@contextmanager
def _plugin_warnings() -> Iterator[None]:
    """Within it, a warning that a plugin broke is shown as a sentence, without a place in qplug."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", PluginWarning)  # a run goes on, whatever -W says
        show = warnings.showwarning

        def say(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, PluginWarning):
                click.echo(f"Warning: {message}", err=True)
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = say
        yield


def _blocked(ctx: click.Context, param: click.Parameter, words: tuple[str, ...]) -> list[str]:
    for word in words:
        if not (word.startswith("no:") and word[3:]):
            raise click.BadParameter(f"{word!r}: say no:NAME", ctx, param)
    return [word[3:] for word in words]


@click.group(
    cls=Qplug,
    name="qplug",
    commands=[Deferred(name, *about) for name, about in COMMANDS.items()],
    epilog="Plugins may add more: qplug plugins list",
)
@click.version_option(__version__, prog_name="qplug", message="%(prog)s %(version)s")
@click.option(
    "-p",
    "blocked",
    metavar="no:NAME",
    multiple=True,
    callback=_blocked,
    help="Leave plugin NAME out. May be repeated.",
)
@click.option(
    "--plugin",
    "files",
    metavar="FILE.py",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Load this file as a plugin. May be repeated.",
)
@click.option("--no-plugins", is_flag=True, help="Leave out all that does not ship with qplug.")
def main(blocked: list[str], files: tuple[Path, ...], no_plugins: bool) -> None:
    """Quantize large language models for SGLang and vLLM."""
    # Torch's threads otherwise spin while they wait, and a machine that does anything else besides
    # is six times as slow. It must be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
