"""Reads the offers of a plugin from its source, without importing the plugin.

A list of plugins and the completion of a shell cannot wait for torch, which most components import.
The source of a plugin usually says what the plugin offers: a hook returns names of classes, and
each class has a ``name`` and a docstring. What the source does not say in this way is left out.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qplug.files.regular import read_bytes
from qplug.registry.plugin import Plugin

_MOST_BYTES = 1 << 22  # of a file of source
#: The kind of offer of each hook that returns components.
_KINDS = {
    "qplug_algorithms": "algorithm",
    "qplug_datasets": "dataset",
    "qplug_exporters": "exporter",
    "qplug_readers": "reader",
}
_COMMANDS = "qplug_commands"


@dataclass(frozen=True)
class Outline:
    """An offer as the source of a plugin describes it: its kind, its name, and one line on it."""

    kind: str
    name: str
    summary: str


def outline(plugin: Plugin) -> list[Outline]:
    """Returns the offers of ``plugin`` that can be read from its source, in the source's order."""
    with suppress(Exception):  # a stranger's finder or source may be anything
        file = Path(plugin.source) if plugin.is_file else _file_of(plugin.module)
        if file is not None:
            return list(_offers(file))
    return []


def _file_of(module: str) -> Path | None:
    """Returns the source file of ``module``; finds it without importing its package."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin)
    if rest:
        file = file.parent.joinpath(*rest.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return file if file.is_file() else None


def _offers(file: Path) -> Iterator[Outline]:
    face = _parsed(file)
    for function in face.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        if function.name == _COMMANDS:
            yield from _commands(function)
        elif kind := _KINDS.get(function.name):
            for name in _returned(function):
                offer = _class(name, [function, face])
                if offer is not None and (named := _name_of(offer)):
                    yield Outline(kind, named, _first_line(offer))


def _parsed(file: Path) -> ast.Module:
    return ast.parse(read_bytes(file, _MOST_BYTES))


def _returned(function: ast.FunctionDef) -> Iterator[str]:
    """The names of the classes in the list that ``function`` returns, as classes or objects."""
    for statement in ast.walk(function):
        value = statement.value if isinstance(statement, ast.Return) else None
        for item in value.elts if isinstance(value, ast.List | ast.Tuple) else ():
            called = item.func if isinstance(item, ast.Call) else item
            if isinstance(called, ast.Name):
                yield called.id


def _class(name: str, scopes: list[ast.FunctionDef | ast.Module]) -> ast.ClassDef | None:
    """The definition of the class ``name`` in ``scopes``, or in a module that they import."""
    for statement in (statement for scope in scopes for statement in scope.body):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return statement
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    file = _file_of(statement.module)
                    return None if file is None else _class(alias.name, [_parsed(file)])
    return None


def _name_of(offer: ast.ClassDef) -> str | None:
    for statement in offer.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else ()
        if any(isinstance(target, ast.Name) and target.id == "name" for target in targets):
            assert isinstance(statement, ast.Assign)
            return _text(statement.value)
    return None


def _commands(hook: ast.FunctionDef) -> Iterator[Outline]:
    """The commands that functions in ``hook`` become by a decorator, ``@group.command(...)``."""
    for function in (each for each in hook.body if isinstance(each, ast.FunctionDef)):
        for call in (each for each in function.decorator_list if isinstance(each, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "command":
                words = [*call.args, *(word.value for word in call.keywords if word.arg == "name")]
                named = _text(words[0]) if words else None
                name = named or function.name.replace("_", "-")
                yield Outline("command", name, _first_line(function))


def _text(value: ast.expr) -> str | None:
    text = value.value if isinstance(value, ast.Constant) else None
    return text if isinstance(text, str) else None


def _first_line(owner: ast.ClassDef | ast.FunctionDef) -> str:
    return (ast.get_docstring(owner) or "").partition("\n")[0]
