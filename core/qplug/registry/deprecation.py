"""Warnings for plugins that implement a hook, or an argument of a hook, that will be removed.

Until 1.0 a minor release may change a hook. From 1.0 on, a hook or argument is deprecated for at
least two minor releases, is an error in 2.0, and is removed in 2.1. It is marked in its
specification::

    @hookspec(warn_on_impl_args={"old": removed_in_2("the argument old of qplug_x", "new")})
    def qplug_x(old, new): ...

pluggy then issues the warning when it registers a plugin, at the line of the implementation.
"""

from __future__ import annotations


class QplugRemovedIn2Warning(DeprecationWarning):
    """A plugin uses something that stops working in qplug 2.0."""


def removed_in_2(what: str, instead: str) -> QplugRemovedIn2Warning:
    """Returns a warning that ``what`` is deprecated, and that ``instead`` replaces it."""
    return QplugRemovedIn2Warning(f"{what} is deprecated and an error in qplug 2.0: use {instead}")
