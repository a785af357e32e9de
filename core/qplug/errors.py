"""The exceptions of qplug: an error that the user can correct is one line, a bug has a traceback.

The command line prints a ``QplugError`` as one line and lets every other exception through.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QplugError(Exception):
    """An error that the user can correct; the message says what is wrong, where, and what to do."""


class PluginError(QplugError):
    """A plugin that the user named is broken; ``__cause__`` is the plugin's own exception."""

    def __init__(self, name: str, source: str, error: BaseException) -> None:
        super().__init__(f"plugin {name} ({source}): {type(error).__name__}: {error}")


class PluginWarning(UserWarning):
    """A plugin that only watches a run raised an exception; the run continues without it."""


class StageError(Exception):
    """A plugin raised an exception while it worked: a bug in the plugin.

    ``where`` names the block, the layer or the file that the plugin was working on.
    """

    def __init__(self, name: str, source: str, where: str, error: BaseException) -> None:
        super().__init__(f"plugin {name} ({source}): {where}: {type(error).__name__}: {error}")


class OtherProcessError(Exception):
    """Another process of this run failed or was killed.

    The finished steps stay on disk, so that the same command can resume the run.
    """


class RelayedError(QplugError):
    """A QplugError of another process of this run, raised again in every process."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns `` Did you mean 'rtn'?`` to append to a message, or "" if no name is similar."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
