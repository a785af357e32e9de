from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest

from qplug import Dataset
from qplug.api.params import options

PLUGINS = {
    "qplug_demo": "demo",
    "qplug_text": "text",
    "qplug_wikitext": "wikitext2",
    "qplug_c4": "c4",
    "qplug_pileval": "pileval",
}


@pytest.mark.parametrize(("plugin", "name"), PLUGINS.items())
def test_a_plugin_offers_one_dataset(plugin: str, name: str) -> None:
    offers: list[type[Dataset[Any]]] = import_module(plugin).qplug_datasets()
    assert [offer.name for offer in offers] == [name]
    assert issubclass(offers[0], Dataset)
    assert offers[0].summary().endswith(".")
    assert all(option.param.help.endswith(".") for option in options(offers[0].Params))


def test_offering_datasets_imports_nothing_heavy() -> None:
    script = (
        f"import sys, {', '.join(PLUGINS)}\n"
        f"for plugin in {', '.join(PLUGINS)}: plugin.qplug_datasets()\n"
        "print(sorted({'torch', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
