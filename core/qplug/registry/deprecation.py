"""How a hook, or an argument of one, is taken away: slowly, and with a word to who uses it.

Until 1.0 a minor release may change a hook. From 1.0 on what goes is deprecated for two minor
releases at least, is an error in 2.0, and is gone in 2.1. A hook is marked where it is specified::

    @hookspec(warn_on_impl_args={"old": removed_in_2("the argument old of qplug_x", "new")})
    def qplug_x(old, new): ...

Whoever implements it is warned as the plugin is imported, at the line of the implementation.
"""

from __future__ import annotations


class QplugRemovedIn2Warning(DeprecationWarning):
    """What is used works until qplug 2.0."""


def removed_in_2(what: str, instead: str) -> QplugRemovedIn2Warning:
    """A warning for a plugin that uses ``what``, and should use ``instead``."""
    return QplugRemovedIn2Warning(f"{what} is deprecated and an error in qplug 2.0: use {instead}")
