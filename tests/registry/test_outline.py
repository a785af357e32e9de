"""The source of a plugin says what it offers, without an import."""

from __future__ import annotations

from pathlib import Path

import pytest

from qplug.registry.outline import Outline, outline
from qplug.registry.plugin import Plugin
from qplug.registry.registry import Registry


def test_every_plugin_of_qplug_says_all_that_it_offers() -> None:
    registry = Registry.installed(only_shipped=True).load()
    plugins = [plugin for plugin in registry.plugins if plugin.ships_with_qplug]
    assert plugins
    for plugin in plugins:
        found = outline(plugin)
        assert {(each.kind, each.name) for each in found} == plugin.offers.keys()
        assert all(each.summary.endswith(".") for each in found)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("", []),
        ("this is no Python", []),
        ("def qplug_algorithms(): return make()", []),
        ("def qplug_algorithms(): return [A]", []),
        ("def qplug_algorithms(): return [A]\nclass A:\n    name = f'a'", []),
        ("from nowhere.at import A\ndef qplug_algorithms(): return [A]", []),
        (
            "class A:\n    'Do it.\\n\\nMore.'\n    name = 'a'\n"
            "def qplug_datasets():\n    return (A,)",
            [Outline("dataset", "a", "Do it.")],
        ),
        (
            "def qplug_readers():\n"
            "    class A:\n        'Reads.'\n        name = 'a'\n    return [A()]",
            [Outline("reader", "a", "Reads.")],
        ),
        (
            "def qplug_commands(group):\n    @group.command(name='x')\n    def y(): pass\n"
            "    @other\n    def z(): pass",
            [Outline("command", "x", "")],
        ),
    ],
)
def test_what_a_file_offers(code: str, found: list[Outline], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    assert outline(Plugin.of_file(tmp_path / "mine.py")) == found


def test_a_plugin_without_a_source_offers_nothing_that_can_be_read() -> None:
    assert outline(Plugin("x", "x 1.0", "no_such_module.at_all", object)) == []
    assert outline(Plugin("x", "x 1.0", "sys", object)) == []
