"""A plugin, and the errors that name it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pluggy

Named = Callable[[Distribution | None], tuple[str | None, str]]


@dataclass
class Plugin:
    """An object with hooks that can be imported, and what became of it.

    ``blocked`` and ``error`` say why it is not used. ``offers`` are its components and commands by
    kind and name, once it has been ``asked``; a plugin with an ``error`` has none that count.
    """

    name: str
    source: str
    module: str
    open: Callable[[], object]
    ships_with_qplug: bool = False
    is_file: bool = False
    blocked: str = ""
    error: BaseException | None = None
    offers: dict[tuple[str, str], Any] = field(default_factory=dict)
    manager: pluggy.PluginManager | None = None
    asked: bool = False
    asked_for_commands: bool = False

    @classmethod
    def of_entry(cls, entry: EntryPoint, named: Named | None = None) -> Plugin:
        owner, source = (named or in_quotes)(entry.dist)
        module = entry.value.partition(":")[0]
        return cls(entry.name, source, module, entry.load, ships_with_qplug=owner == "qplug")

    @classmethod
    def of_file(cls, path: Path) -> Plugin:
        # The prefix keeps a file called torch.py from hiding torch.
        module = f"qplug_file_{path.stem}"
        return cls(path.stem, str(path), module, partial(_import, path, module), is_file=True)

    @classmethod
    def of_object(cls, plugged: object, name: str) -> Plugin:
        """A plugin that is at hand: a module, or an object whose methods are hooks."""
        kind = plugged if isinstance(plugged, ModuleType) else type(plugged)
        module = getattr(kind, "__module__", kind.__name__)
        return cls(name, "an object", module, lambda: plugged)

    @property
    def takes_part(self) -> list[str]:
        """The hooks it implements beside those that offer something, once it is imported."""
        if self.manager is None:
            return []
        hooks = ("qplug_model_view", "qplug_block_done", "qplug_run_done")
        return [hook for hook in hooks if getattr(self.manager.hook, hook).get_hookimpls()]

    @property
    def status(self) -> str:
        return "blocked" if self.blocked else "failed" if self.error else "ok"

    def __str__(self) -> str:
        return f"{self.name} ({self.source})"


def in_quotes(package: Distribution | None) -> tuple[str | None, str]:
    """The name of a package, and its name and version as messages have it."""
    # A half-removed package has no name, or raises when asked for it.
    with suppress(Exception):
        if package and (name := package.name):
            return name, f"{name} {package.version}"
    return None, "a package without metadata"


def _import(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up to read their annotations.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def canonical(name: str) -> str:
    return name.replace("_", "-")


def _same(name: str, other: str) -> bool:
    return canonical(name) == canonical(other)


def among(name: str, names: Iterable[str]) -> bool:
    return any(_same(name, other.strip()) for other in names)
