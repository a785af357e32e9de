"""The border to the code of plugins: what crosses it by mistake is kept from everybody else.

A plugin may raise anything, even ``SystemExit``, and may print. Outside of qplug's border both
would hurt the run, other plugins, or the program that reads qplug's output.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from types import FrameType
from typing import NoReturn

import click

from qplug.errors import CtrlC, OtherProcessError, PluginError, QplugError, StageError
from qplug.registry.plugin import Plugin

#: Exceptions that end a command instead of saying what is wrong.
ENDS = (SystemExit, KeyboardInterrupt, click.exceptions.Exit, click.exceptions.Abort)


@contextmanager
def keeping_error(plugin: Plugin) -> Iterator[None]:
    """Keeps an error from the ``with`` block in ``plugin.error`` instead of raising it.

    What the block prints goes to stderr. Ctrl-C is raised.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except BaseException as error:  # a plugin may raise anything, a script even SystemExit
        if is_ctrl_c(error):
            raise
        plugin.error = error


@contextmanager
def blaming(
    find: Callable[[BaseException], Plugin | None], name: str, where: str
) -> Iterator[None]:
    """A context that turns what a plugin raised into an error that names the plugin.

    ``find`` returns the plugin behind an exception, None if there is none. An exception becomes a
    StageError on ``name``, a component, and ``where``; without ``name`` it passes as it is. What
    would end the process becomes a PluginError. An exception of qplug's own class passes.
    """
    try:
        yield
    except (QplugError, StageError, OtherProcessError, GeneratorExit):
        raise
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        plugin = find(error)
        ends = isinstance(error, ENDS) or not isinstance(error, Exception)
        if plugin is not None and ends:
            place = ": ".join(part for part in (name, where) if part not in ("", plugin.name))
            raise PluginError(plugin.name, plugin.source, error, place) from error
        if ends or not name:
            raise
        source, owner = (plugin.source, plugin.name) if plugin else ("no plugin", "")
        raise StageError(name, source, where, error, owner) from error


# --- Ctrl-C ---------------------------------------------------------------------------------------


#: Whether Ctrl-C raises ``CtrlC`` here.
_marked: ContextVar[bool] = ContextVar("marked", default=False)


@contextmanager
def marking_ctrl_c() -> Iterator[None]:
    """Within the context Ctrl-C raises ``CtrlC``, where Python would raise KeyboardInterrupt.

    A plain KeyboardInterrupt then comes from a plugin.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    replaced = is_main and handler is signal.default_int_handler
    if replaced:
        signal.signal(signal.SIGINT, _raise_ctrl_c)
    token = _marked.set(replaced or handler is signal.SIG_IGN)
    try:
        yield
    finally:
        _marked.reset(token)
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def is_ctrl_c(error: BaseException) -> bool:
    """Returns whether the user pressed Ctrl-C.

    Outside of ``marking_ctrl_c`` every KeyboardInterrupt counts as the user's.
    """
    return isinstance(error, CtrlC if _marked.get() else KeyboardInterrupt)


def _raise_ctrl_c(number: int, frame: FrameType | None) -> NoReturn:
    raise CtrlC
