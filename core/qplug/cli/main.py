"""The entry point of the command line. A command's module is imported only when it runs."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

import click

from qplug import __version__
from qplug.cli.defaults import default_map
from qplug.cli.printing import SETTINGS, note, warn
from qplug.errors import OtherProcessError, PluginWarning, QplugError, shown
from qplug.machine.launch import Launch
from qplug.registry.border import marking_ctrl_c
from qplug.registry.registry import Registry

#: Seconds that a process waits before it exits with an error. torchrun kills all processes as soon
#: as one has exited, which could be before the first process has printed the error.
_EXIT_DELAY = 3

#: Errors of the system that the user can mend: rights, room, open files, names that are too long.
_OF_THE_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
}

#: The most characters of an error: what it quotes from a file may be as long as the file.
_LONGEST = 2000

#: The place of each command of qplug itself, and its line in ``qplug --help``, by name.
COMMANDS = {
    "quantize": ("qplug.cli.quantize:command", "Quantize a checkpoint."),
    "convert": ("qplug.cli.convert:command", "Change the format of a folder, keep its codes."),
    "eval": ("qplug.cli.eval:command", "Measure perplexity, scores in tasks, or behaviour."),
    "config": ("qplug.cli.config:command", "Check and convert recipes and LLMC files."),
    "verify": ("qplug.cli.verify:command", "Check that an engine can load a folder."),
    "serve": ("qplug.cli.serve:command", "Verify a folder, and start the engine on it."),
    "inspect": ("qplug.cli.inspect:command", "Print the contents of a quantized folder."),
    "report": ("qplug.cli.report:command", "Write an HTML report on a quantized folder."),
    "compare": ("qplug.cli.compare:command", "Compare several folders in a table and a plot."),
    "push": ("qplug.cli.push:command", "Upload a quantized folder to the Hub."),
    "plan": ("qplug.cli.plan:command", "Choose a scheme for a model and GPUs."),
    "schemes": ("qplug.cli.schemes:command", "List schemes, and which engine runs them."),
    "plugins": ("qplug.cli.plugins:command", "List, check, describe and create plugins."),
    "doctor": ("qplug.cli.doctor:command", "Check this machine, its engines and plugins."),
    "completion": ("qplug.cli.completion:command", "Print the completion script of a shell."),
}


class Deferred(click.Command):
    """A placeholder for a command, so that ``--help`` can list it without importing its module."""

    def __init__(self, name: str, target: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self.target = target

    def load(self) -> click.Command:
        """Imports the module of the command, and returns the command."""
        module, _, attribute = self.target.partition(":")
        return cast("click.Command", getattr(import_module(module), attribute))


class Qplug(click.Group):
    """The group of all commands: prints a QplugError as one line, and a bug with its traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a command. Only the first of several processes prints; any prints a traceback.

        If the first was killed, another one says so.
        """
        try:
            with marking_ctrl_c():
                return self._main(*args, **kwargs)
        except Exception:
            sys.excepthook = _print_traceback  # Python prints it, and names in it must only show
            raise

    def _main(self, *args: Any, **kwargs: Any) -> Any:
        if Launch.of().is_first:
            return super().main(*args, **kwargs)
        try:
            with (
                Path(os.devnull).open("w") as nowhere,
                redirect_stdout(nowhere),
                redirect_stderr(nowhere),
            ):
                return super().main(*args, **kwargs)
        except SystemExit as end:
            if end.code:
                time.sleep(_EXIT_DELAY)
            raise

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Reads the options of qplug itself."""
        try:
            return super().make_context(*args, **kwargs)
        except click.ClickException as error:
            raise _in_one_line(error) from error

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
            ctx.default_map = default_map()
            with _plugin_warnings():
                return super().invoke(ctx)
        except QplugError as error:
            raise click.ClickException(_in_words(error)) from error
        except OtherProcessError as error:
            note(f"Error: {error}")
            if Launch.of().is_first:
                time.sleep(_EXIT_DELAY)
            elif error.first_left:  # nobody else can say it
                note(f"Error: {error}", file=sys.__stderr__)
            raise click.exceptions.Exit(1) from error
        except click.ClickException as error:
            raise _in_one_line(error) from error
        except (click.exceptions.Exit, click.Abort):
            raise
        except OSError as error:
            if error.errno not in _OF_THE_MACHINE:
                raise
            file = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{file}{error.strerror}") from error
        except Exception as error:
            plugin = ctx.obj.blame(error) if isinstance(ctx.obj, Registry) else None
            if plugin is not None:
                removable = not (plugin.ships_with_qplug or plugin.is_file)
                hint = f" To run without it: qplug --no-plugins, or -p no:{plugin.name}"
                note(f"The error below is from plugin {plugin}.{hint * removable}")
            raise


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    for text in traceback.format_exception(kind, error, trace):
        for line in text.removesuffix("\n").split("\n"):
            note(line)


def _in_words(error: Exception) -> str:
    """Returns the message of ``error`` on one line, in characters that a terminal only shows."""
    text = shown(" ".join(str(error).splitlines()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _in_one_line(error: click.ClickException) -> click.ClickException:
    """Returns ``error`` with its message on one line: it may quote an argument, such as a name."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error
    text = shown(error.format_message())
    if isinstance(error, click.UsageError):
        return click.UsageError(text, error.ctx)
    return click.ClickException(text)


@contextmanager
def _plugin_warnings() -> Iterator[None]:
    """A context that prints a PluginWarning as one sentence, without a file and a line of qplug."""
    with warnings.catch_warnings():
        # Never an error, whatever -W says: a broken watcher must not stop a run.
        warnings.simplefilter("always", PluginWarning)
        show = warnings.showwarning

        def print_sentence(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, PluginWarning):
                warn(message)
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = print_sentence
        yield


def _blocked(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """Returns the names in the values of ``-p``, which have the form ``no:NAME``."""
    for value in values:
        if not (value.startswith("no:") and value[3:]):
            raise click.BadParameter(f"{value!r}: use no:NAME", ctx, param)
    return [value[3:] for value in values]


@click.group(
    cls=Qplug,
    name="qplug",
    context_settings=SETTINGS,
    commands=[Deferred(name, *place_and_summary) for name, place_and_summary in COMMANDS.items()],
    epilog="Plugins may add more commands: qplug plugins list",
)
@click.version_option(__version__, prog_name="qplug", message="%(prog)s %(version)s")
@click.option(
    "-p",
    "blocked",
    metavar="no:NAME",
    multiple=True,
    callback=_blocked,
    help="Switch plugin NAME off. May be repeated.",
)
@click.option(
    "--plugin",
    "files",
    metavar="FILE.py",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Load this file as a plugin. May be repeated.",
)
@click.option(
    "--no-plugins", is_flag=True, help="Switch off all plugins that do not ship with qplug."
)
def main(blocked: list[str], files: tuple[Path, ...], no_plugins: bool) -> None:
    """Quantize large language models for SGLang and vLLM."""
    # By default torch's threads spin while they wait, which makes a run six times as slow on a
    # machine with other work. The variable must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
