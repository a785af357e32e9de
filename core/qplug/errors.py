"""How qplug says no: what the user can mend is one line, a bug keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QplugError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what to do."""


class PluginError(QplugError):
    """A plugin that was asked for by name does not work; ``__cause__`` says why."""

    def __init__(self, name: str, source: str, error: BaseException) -> None:
        super().__init__(f"plugin {name} ({source}): {type(error).__name__}: {error}")


class PluginWarning(UserWarning):
    """A plugin that only watches a run broke; the run goes on without it."""


class StageError(Exception):
    """A plugin broke while it worked: a bug of that plugin, with what it was working on."""

    def __init__(self, name: str, source: str, where: str, error: BaseException) -> None:
        super().__init__(f"plugin {name} ({source}): {where}: {type(error).__name__}: {error}")


class OtherProcessError(Exception):
    """Another process of this run broke or was ended; what was written stays, to go on from."""


class RelayedError(QplugError):
    """A QplugError of another process of this run, raised in all of them."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A sentence to add to a message, a space before it; nothing if no name is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
