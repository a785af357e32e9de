"""Writes the package of a new plugin from the templates of the installed qplug."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal, TypeAlias

from qplug.errors import QplugError
from qplug.registry.registry import Registry

Kind: TypeAlias = Literal["algorithm", "dataset", "exporter", "command", "hook", "architecture"]

#: The command in the README of the new plugin that tries it out, by kind.
_TRIALS: dict[str, str] = {
    "algorithm": "qplug quantize qplug:demo --algo {name} --out out",
    "dataset": "qplug quantize qplug:demo --algo gptq --dataset {name} --out out",
    "exporter": "qplug quantize qplug:demo --scheme W8A16 --backend {name} --out out",
    "command": "qplug {name} MODEL",
    "hook": "qplug quantize qplug:demo --out out && cat out.{name}.txt",
    "architecture": "qplug quantize MODEL --out out",
}

#: Kinds whose tests are a contract of ``qplug.testing``.
_WITH_CONTRACT = ("algorithm", "dataset", "exporter")
_CONTRACT = "the contract tests that qplug's own plugins pass"


def write_plugin(name: str, kind: Kind, folder: Path, registry: Registry, version: str) -> Path:
    """Writes a working package ``qplug-NAME`` with tests into the new ``folder``; returns it.

    ``version`` is the version of qplug that the package requires. Raises QplugError if ``name`` is
    not allowed or is taken, or if ``folder`` exists or its parent does not.
    """
    _check(name, registry)
    if folder.exists():
        raise QplugError(f"{folder}: exists; choose another --folder")
    if not folder.absolute().parent.is_dir():
        raise QplugError(f"{folder.absolute().parent}: no such folder to write into")
    module = name.replace("-", "_")
    major, minor = version.split(".")[:2]
    words = {
        "name": name,
        "kind": kind,
        "package": f"qplug_{module}",
        "module": module,
        "class_name": "".join(word.capitalize() for word in name.split("-")),
        "article": "An" if kind[0] in "aeiou" else "A",
        "article_low": "an" if kind[0] in "aeiou" else "a",
        "tests": _CONTRACT if kind in _WITH_CONTRACT else "its tests",
        "since": f"{major}.{minor}",
        "until": f"{major}.{int(minor) + 1}" if major == "0" else f"{int(major) + 1}",
        "try_it": _TRIALS[kind].format(name=name),
    }
    package = folder / words["package"]
    targets = {
        "pyproject.toml": folder / "pyproject.toml",
        "README.md": folder / "README.md",
        "LICENSE": folder / "LICENSE",
        "gitignore": folder / ".gitignore",
        "workflow.yml": folder / ".github" / "workflows" / "test.yml",
        f"{kind}/__init__.py": package / "__init__.py",
        f"{kind}/module.py": package / f"{module}.py",
        f"{kind}/test_contract.py": folder / "tests" / "test_contract.py",
    }
    for source, target in targets.items():
        text = (files("qplug") / "templates" / f"{source}.template").read_text(encoding="utf-8")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(text).substitute(words), encoding="utf-8")
    (package / "py.typed").touch()
    return folder


def _check(name: str, registry: Registry) -> None:
    """Raises QplugError if a new plugin cannot be called ``name``."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise QplugError(f"{name!r}: a name is lower case, digits and single hyphens")
    if name.replace("-", "_") in sys.stdlib_module_names:
        raise QplugError(f"{name!r} is a module of Python itself; choose another name")
    for plugin in registry.plugins:
        if plugin.name.replace("_", "-") == name:
            raise QplugError(f"{name!r} is taken by plugin {plugin}; choose another name")
