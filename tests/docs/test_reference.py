"""docs/reference says what the code says, and every hook has its heading and an example."""

from __future__ import annotations

import importlib.util
import re
import types
from pathlib import Path

import pluggy
import pytest

from qplug.api import hookspecs


@pytest.fixture(scope="module")
def generator(root: Path) -> types.ModuleType:
    file = root / "tools/generate_reference.py"
    spec = importlib.util.spec_from_file_location("generate_reference", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_what_the_code_says(generator: types.ModuleType) -> None:
    written = {path.name: path.read_text() for path in generator.FOLDER.glob("*.md")}
    made = generator.pages()
    assert set(written) == set(made)
    for name, text in made.items():
        assert written[name] == text, f"docs/reference/{name} is not up to date: make reference"


def test_every_hook_has_a_heading_with_its_arguments(root: Path) -> None:
    manager = pluggy.PluginManager("qplug")
    manager.add_hookspecs(hookspecs)
    page = (root / "docs/reference/hooks.md").read_text()
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    specs = [name for name in vars(manager.hook) if name.startswith("qplug_")]
    wanted = []
    for name in specs:
        spec = getattr(manager.hook, name).spec
        assert spec is not None
        wanted.append(f"{name}({', '.join(spec.argnames)})")
    assert len(wanted) >= 4
    assert sorted(headings) == sorted(wanted)


def test_examples_of_hooks_are_implementations(root: Path) -> None:
    page = (root / "docs/reference/hooks.md").read_text()
    manager = pluggy.PluginManager("qplug")
    manager.add_hookspecs(hookspecs)
    hooks = [name for name in vars(manager.hook) if name.startswith("qplug_")]
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        _, *examples = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
        assert len(examples) == 1, part.partition("\n")[0]
        module = types.ModuleType(part.partition("(")[0])
        exec(compile(examples[0], "hooks.md", "exec", dont_inherit=True), vars(module))
        manager.register(module)
        manager.check_pending()
    assert all(getattr(manager.hook, name).get_hookimpls() for name in hooks)
