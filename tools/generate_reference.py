"""Writes docs/reference from the code: commands, hooks, recipe, options of plugins, Python API.

Run by ``make reference``; ``tests/docs/test_reference.py`` fails where a page is not what the code
says.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from api_page import api_page, prose
from click.testing import CliRunner

import qplug
from qplug.api import hookspecs
from qplug.api.params import Option, options
from qplug.cli.main import Deferred, main
from qplug.recipe.recipe_file import schema
from qplug.recipe.words import Word, words
from qplug.registry.registry import Registry

#: In which no default of the user who makes the pages stands.
_ENVIRONMENT = {
    "COLUMNS": "80",
    "XDG_CONFIG_HOME": os.devnull,
    **dict.fromkeys(("QPLUG_DEVICE", "QPLUG_BACKEND", "QPLUG_DATASET", "QPLUG_CHECK")),
}

FOLDER = Path(__file__).parents[1] / "docs/reference"

_KINDS = {"algorithms": "Algorithms", "datasets": "Datasets", "exporters": "Exporters"}


def pages() -> dict[str, str]:
    """The text of each page, by file name."""
    registry = Registry.installed(only_shipped=True)
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "api.md": api_page,
        "cli.md": _command_page,
        "hooks.md": _hook_page,
        "plugins.md": lambda: _plugin_page(registry),
        "recipe.md": _recipe_page,
    }
    made = "<!-- Made from the code by tools/generate_reference.py: change that, not this. -->"
    return {name: "\n\n".join([made, *make()]) + "\n" for name, make in makers.items()}


# --- commands ------------------------------------------------------------------------------------


def command_paths() -> Iterator[tuple[str, ...]]:
    """Every command of qplug itself, as words: ``("plugins", "list")``."""
    yield ()
    for name, command in main.commands.items():
        loaded = command.load() if isinstance(command, Deferred) else command
        yield (name,)
        if isinstance(loaded, click.Group):
            yield from ((name, inner) for inner in loaded.commands)


def _command_page() -> Iterator[str]:
    yield "# Commands"
    yield "What `--help` prints. A usage error ends with status 2, any other with 1."
    for path in command_paths():
        words = [*path, "--help"]
        done = CliRunner(env=_ENVIRONMENT).invoke(main, words, prog_name="qplug")
        assert done.exit_code == 0, done.output
        yield f"## {' '.join(('qplug', *path))}"
        yield _fenced("text", done.output)


# --- hooks ---------------------------------------------------------------------------------------


def hooks() -> dict[str, Callable[..., Any]]:
    """The hook specifications, by name, in the order of their module."""
    return {
        name: found
        for name, found in vars(hookspecs).items()
        if name.startswith("qplug_") and inspect.isfunction(found)
    }


def _hook_page() -> Iterator[str]:
    yield "# Hooks"
    yield (
        "A plugin is a module with implementations of these, marked with `qplug.hookimpl`, named "
        "by an entry point of the group `qplug` (or given as `qplug --plugin FILE.py`). "
        "It may take fewer arguments than a hook has, by name."
    )
    for name, hook in hooks().items():
        signature = inspect.signature(hook)
        yield f"## {name}({', '.join(signature.parameters)})"
        plain = str(signature).replace("'", "")  # annotations are strings
        signed = _fenced("python", f"def {name}{plain}: ...")
        yield f"<!-- not run: a signature -->\n{signed}"
        yield from _prose_and_example(inspect.getdoc(hook) or "")


def _prose_and_example(docstring: str) -> Iterator[str]:
    """A docstring with ``Example::`` at its end, whose code is completed by its imports."""
    yield prose(docstring)
    example = docstring.partition("Example::")[2]
    if not example:
        return
    code = inspect.cleandoc(example)
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    imports = ["import click", ""] if "click" in used else []
    imports += [f"from qplug import {', '.join(sorted(used & set(qplug.__all__)))}", "", ""]
    yield "Example:"
    yield _fenced("python", "\n".join([*imports, code]))


# --- plugins -------------------------------------------------------------------------------------


def _plugin_page(registry: Registry) -> Iterator[str]:
    yield "# Plugins that ship with qplug"
    yield (
        "Options are given as `-o NAME.OPTION=V` for algorithms, `--dataset-opt OPTION=V` and "
        "`--backend-opt OPTION=V`, or in a [recipe](recipe.md). "
        "`qplug plugins show NAME` prints the same, of installed ones too."
    )
    for kind, title in _KINDS.items():
        offers = getattr(registry, kind)
        yield f"## {title}"
        for name in offers:
            yield f"### {name}"
            yield re.sub(r"``(.+?)``", r"`\1`", inspect.getdoc(offers[name]) or "")
            if found := options(offers[name].Params):
                yield _table(["option", "type", "default", ""], map(_option_row, found))


def _option_row(option: Option) -> list[str]:
    default = "required" if option.required else _literal(option.default)
    also = f" Also called {_listed(option.param.also)}." if option.param.also else ""
    return [f"`{option.name}`", f"`{option.type_name}`", default, option.param.help + also]


def _literal(value: object) -> str:
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# --- recipes -------------------------------------------------------------------------------------

#: Where a file says the options of algorithms, which are a field of their own.
_IN_THE_PIPELINE = "pipeline[].options"


def _recipe_page() -> Iterator[str]:
    yield "# Recipe"
    yield (
        "A YAML file for `qplug quantize --config FILE`. `qplug config check FILE` checks it, "
        "`qplug config schema` prints this as a JSON Schema, for editors that complete and check. "
        "The same fields are options of `qplug quantize`, keywords of `qplug.quantize`, and "
        "`recipe` in `qplug.json`."
    )
    said = {word.place or _IN_THE_PIPELINE: word for word in words()}
    rows = (
        [key, *_words_for(said.get(key.strip("`"))), *rest]
        for key, *rest in _recipe_rows(schema(), "")
    )
    yield _table(["key", "option", "keyword", "type", "default", ""], rows)


def _words_for(word: Word | None) -> tuple[str, str]:
    """How the command line and Python say a key; nothing if only files say it."""
    return (f"`{word.key.field.flag}`", f"`{word.name}`") if word else ("", "")


def _recipe_rows(part: Mapping[str, Any], prefix: str) -> Iterator[list[str]]:
    for name, told in part.get("properties", {}).items():
        default = _literal(told["default"]) if told.get("default") not in (None, {}, []) else ""
        if name in part.get("required", ()):
            default = "required"
        yield [f"`{prefix}{name}`", _type(told), default, told.get("description", "")]
        if prefix == "overrides[]." and name == "scheme":
            continue  # as above
        for inner in [told, *told.get("anyOf", ())]:
            if "properties" in inner:
                yield from _recipe_rows(inner, f"{prefix}{name}.")
            for item in [inner.get("items", {}), *inner.get("items", {}).get("anyOf", ())]:
                yield from _recipe_rows(item, f"{prefix}{name}[].")


def _type(told: Mapping[str, Any]) -> str:
    if "enum" in told:
        return " or ".join(f"`{value}`" for value in told["enum"])
    if "anyOf" in told:
        return " or ".join(dict.fromkeys(map(_type, told["anyOf"])))
    if told.get("type") == "array":
        return f"list of {_type(told['items'])}"
    names = told.get("type", "any")
    names = [names] if isinstance(names, str) else names
    return " or ".join({"object": "mapping", "null": "none"}.get(name, name) for name in names)


# --- markdown ------------------------------------------------------------------------------------


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _table(header: list[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in pages().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
