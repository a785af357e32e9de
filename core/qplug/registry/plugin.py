"""One plugin: where it comes from, why it is not used, and what it offers."""

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

#: Seconds that the import of a plugin may take. Every command that needs plugins waits for them.
SLOW_IMPORT = 1.0

#: A function like ``describe_package``.
DescribePackage = Callable[[Distribution | None], tuple[str | None, str]]


@dataclass
class Plugin:
    """A plugin and its state: not imported, imported, switched off, or broken.

    ``source`` is the package and version, or the file, for messages. ``open`` imports the plugin
    and returns the object whose methods are hooks. ``blocked`` is the option or environment
    variable that switches the plugin off, "" if none does. ``error`` is the exception that the
    plugin raised, None while it works. ``import_seconds`` is the time that the import took, 0
    before it; ``told_slow`` is whether a warning has said that it took long.

    ``offers`` are its component classes and commands, by kind and name. Components are there once
    ``asked`` is true, commands once ``asked_for_commands`` is. The offers of a plugin with an
    ``error`` do not count. ``manager`` calls the hooks of this plugin alone.
    """

    name: str
    source: str
    module: str
    open: Callable[[], object]
    ships_with_qplug: bool = False
    is_file: bool = False
    blocked: str = ""
    error: BaseException | None = None
    import_seconds: float = 0.0
    told_slow: bool = False
    offers: dict[tuple[str, str], Any] = field(default_factory=dict)
    manager: pluggy.PluginManager | None = None
    asked: bool = False
    asked_for_commands: bool = False

    @classmethod
    def of_entry(cls, entry: EntryPoint, describe: DescribePackage | None = None) -> Plugin:
        """Returns the plugin behind an entry point of an installed package, not yet imported."""
        package, source = (describe or describe_package)(entry.dist)
        module = entry.value.partition(":")[0]
        return cls(entry.name, source, module, entry.load, ships_with_qplug=package == "qplug")

    @classmethod
    def of_file(cls, path: Path) -> Plugin:
        """Returns the plugin in a single Python file, named after the file, not yet imported."""
        # The prefix keeps a file called torch.py from hiding torch.
        module = f"qplug_file_{path.stem}"
        return cls(path.stem, str(path), module, partial(_import, path, module), is_file=True)

    @classmethod
    def of_object(cls, plugged: object, name: str) -> Plugin:
        """Returns a plugin for an object in memory: a module, or one whose methods are hooks."""
        definition = plugged if isinstance(plugged, ModuleType) else type(plugged)
        module = getattr(definition, "__module__", definition.__name__)
        return cls(name, "an object", module, lambda: plugged)

    @property
    def takes_part(self) -> list[str]:
        """The hooks that it implements without offering anything; empty before the import."""
        if self.manager is None:
            return []
        hooks = (
            *("qplug_model_view", "qplug_run_begun", "qplug_stage_begun", "qplug_block_done"),
            "qplug_run_done",
        )
        return [hook for hook in hooks if getattr(self.manager.hook, hook).get_hookimpls()]

    @property
    def is_slow(self) -> bool:
        """Whether the import took longer than ``SLOW_IMPORT``."""
        return self.import_seconds > SLOW_IMPORT

    @property
    def import_time(self) -> str:
        """The time of the import, in words."""
        return f"its import took {self.import_seconds:.1f} s"

    @property
    def status(self) -> str:
        """``blocked``, ``failed`` or ``ok``; a plugin that is not yet imported is ``ok``."""
        return "blocked" if self.blocked else "failed" if self.error else "ok"

    def __str__(self) -> str:
        return f"{self.name} ({self.source})"


def describe_package(package: Distribution | None) -> tuple[str | None, str]:
    """Returns a package's name, None if it is unknown, and a text for messages: name, version."""
    # The metadata of a half-removed package have no name, or raise when the name is read.
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
    """Returns the spelling of a plugin's name with hyphens instead of underscores."""
    return name.replace("_", "-")


def same_name(first: str, second: str) -> bool:
    """Returns whether two names differ in nothing but hyphens and underscores."""
    return canonical(first) == canonical(second)


def is_listed(name: str, names: Iterable[str]) -> bool:
    """Returns whether ``names`` contain ``name``, spaces around them aside."""
    return any(same_name(name, listed.strip()) for listed in names)
