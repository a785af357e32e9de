"""The exceptions of qplug: an error that the user can correct is one line, a bug has a traceback.

The command line prints a ``QplugError`` as one line and lets every other exception through.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QplugError(Exception):
    """An error that the user can correct; the message says what is wrong, where, and what to do."""


class PluginError(QplugError):
    """A plugin is broken, or tried to end the process; ``__cause__`` is the plugin's exception.

    ``where`` names what the plugin was working on.
    """

    def __init__(self, name: str, source: str, error: BaseException, where: str = "") -> None:
        place = f"{where}: " if where else ""
        super().__init__(f"plugin {name} ({source}): {place}{reason(error)}")


class PluginWarning(UserWarning):
    """A plugin that only watches a run raised an exception; the run continues without it."""


class StageError(Exception):
    """A plugin raised an exception while it worked: a bug in the plugin.

    ``where`` names the block, the layer or the file that the plugin was working on. ``plugin`` is
    the name of the plugin, ``name`` the name of its component.
    """

    def __init__(
        self, name: str, source: str, where: str, error: BaseException, plugin: str = ""
    ) -> None:
        self.plugin = plugin or name
        super().__init__(f"plugin {name} ({source}): {where}: {reason(error)}")


class OtherProcessError(Exception):
    """Another process of this run failed or was killed.

    The finished steps stay on disk, so that the same command can resume the run.
    """

    #: Whether this process must say so, as no process before it is left on this machine.
    first_left = False


class CtrlC(KeyboardInterrupt):
    """The user pressed Ctrl-C. A plugin that raises KeyboardInterrupt raises another class."""


class RelayedError(QplugError):
    """A QplugError of another process of this run, raised again in every process."""


def reason(error: BaseException) -> str:
    """Returns the type and the message of ``error``, which a stranger's code may have raised."""
    try:
        message = str(error)
    except Exception:  # a stranger's __str__ may raise anything
        message = "an exception without a readable message"
    kind = type(error).__name__
    return f"{kind}: {message}" if message else kind


def shown(text: object) -> str:
    """Returns ``text`` on one line, in characters that change nothing but the line they are on.

    Every other character, such as a line break, a control character of the terminal, or a mark that
    turns the direction of the text, becomes its escape: ``\\n``, ``\\x1b``, ``\\u202e``.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns `` Did you mean 'rtn'?`` to append to a message, or "" if no name is similar."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
