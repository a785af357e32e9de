"""Public modules under the paths that they had before 0.2: they hand on, and warn.

They go with 0.3. A table and one finder stand for them, so that no file keeps an old name.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Where the names of a module are now, by the module's old path.
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
#: What a name is called now, by its old path and name.
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


class _OldPath(ModuleType):
    """A module that has no names of its own."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(
            import_module(MOVED[self.__name__]), RENAMED.get((self.__name__, name), name)
        )


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldPath(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} goes with qplug 0.3: import from {new}", FutureWarning, stacklevel=2
        )


def forward_old_paths() -> None:
    """From now on, an old path can be imported where no module has its name."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
