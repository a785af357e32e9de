"""Keeps the module paths from before 0.2 working: an import of an old path warns and forwards.

The old paths will be removed in 0.3. A table and one import finder replace a file for each path.
Some old modules are packages now; they forward the names that they had with ``moved_names``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: The module that has a module's names now, by the old path.
MOVED = {
    "qplug.clipping": "qplug.numerics",
    "qplug.hadamard": "qplug.numerics",
    "qplug.hub_text": "qplug.text",
    "qplug.laid_out": "qplug",
    "qplug.learning": "qplug.numerics",
    "qplug.limits": "qplug",
    "qplug.params": "qplug",
    "qplug.rotation": "qplug.numerics",
    "qplug.scheme": "qplug",
    "qplug.stored_scales": "qplug.numerics",
    "qplug.straight_through": "qplug.numerics",
    "qplug.turning": "qplug.numerics",
    "qplug.windows": "qplug.text",
}
#: The present name, by the old path and the old name.
RENAMED = {
    ("qplug.hadamard", "exists"): "hadamard_exists",
    ("qplug.hadamard", "matrix"): "hadamard_matrix",
    ("qplug.hadamard", "transform"): "hadamard_transform",
    ("qplug.rotation", "Hadamard"): "HadamardRotation",
    ("qplug.rotation", "Random"): "RandomRotation",
    ("qplug.rotation", "Written"): "ExplicitRotation",
    ("qplug.stored_scales", "global_scale"): "covering_global_scale",
    ("qplug.straight_through", "range_scale"): "range_scale_with_gradients",
    ("qplug.straight_through", "ranges"): "ranges_with_gradients",
    ("qplug.turning", "turned"): "rotated_model",
}


def moved_names(module: str, moved: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` for ``module``, which warns and forwards names that were moved.

    ``moved`` has the present module and the present name, by the old name.
    """

    def getattribute(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        door, new = moved[name]
        warnings.warn(
            f"{module}.{name} will be removed in qplug 0.3: import {new} from {door}",
            FutureWarning,
            stacklevel=2,
        )
        return getattr(import_module(door), new)

    return getattribute


class _OldPath(ModuleType):
    """A module without names of its own, which looks every name up in its present module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(
            import_module(MOVED[self.__name__]), RENAMED.get((self.__name__, name), name)
        )


class _Finder(MetaPathFinder, Loader):
    """Imports the paths in ``MOVED``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldPath(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} will be removed in qplug 0.3: import from {new}",
            FutureWarning,
            stacklevel=2,
        )


def forward_old_paths() -> None:
    """Makes old paths importable from now on; real modules of the same name come first."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
