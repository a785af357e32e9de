"""Who implements a hook that goes, or an argument of one that goes, is told so by name and line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qplug import hookimpl
from qplug.api.hookspecs import hookspec
from qplug.registry.deprecation import QplugRemovedIn2Warning, removed_in_2
from qplug.testing import bare_registry


class Specs:
    """Hooks of some later qplug."""

    @hookspec(warn_on_impl_args={"old": removed_in_2("the argument old of qplug_sing", "new")})
    def qplug_sing(self, old: int, new: int) -> None: ...

    @hookspec(warn_on_impl=removed_in_2("qplug_dance", "qplug_sing"))
    def qplug_dance(self) -> None: ...


class Old:
    @hookimpl
    def qplug_sing(self, old: int) -> None: ...


class New:
    @hookimpl
    def qplug_sing(self, new: int) -> None: ...


class Dancing:
    @hookimpl
    def qplug_dance(self) -> None: ...


def implementing(plugin: object, hook: str) -> list[str]:
    return [found.name for found, _ in bare_registry(plugin).implementing(hook)]


@pytest.fixture(autouse=True)
def _later(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = SimpleNamespace(qplug_sing=Specs.qplug_sing, qplug_dance=Specs.qplug_dance)
    monkeypatch.setattr("qplug.registry.registry.hookspecs", specs)


def test_a_deprecated_argument_warns_and_works() -> None:
    with pytest.warns(QplugRemovedIn2Warning, match="the argument old of qplug_sing .* use new"):
        assert implementing(Old(), "qplug_sing") == ["plugin-0"]


def test_a_deprecated_hook_warns_at_the_line_of_the_plugin() -> None:
    with pytest.warns(QplugRemovedIn2Warning, match="qplug_dance is deprecated") as warned:
        assert implementing(Dancing(), "qplug_dance") == ["plugin-0"]
    assert warned[0].filename == __file__


def test_what_stays_warns_of_nothing() -> None:
    assert implementing(New(), "qplug_sing") == ["plugin-0"]
