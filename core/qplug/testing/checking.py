"""How contracts fail: with one sentence that tells the author what to mend."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qplug.api import Component
from qplug.api.params import fill, options
from qplug.errors import QplugError

#: What the face of a plugin must not import: everyone who lists plugins would wait for it.
HEAVY = ("torch", "transformers", "datasets")


def demand(condition: object, sentence: str) -> None:
    """Raises AssertionError with ``sentence`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(sentence)


@contextmanager
def demanding(sentence: str) -> Iterator[None]:
    """Within it, an error is a failure: ``sentence``, and what was raised."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{sentence}: {type(error).__name__}: {error}") from error


class ComponentContract:
    """What every component must keep, whatever its kind. Subclass one of the three others."""

    #: Parameters to test with, as a user would give them; the rest have their defaults.
    options: Mapping[str, Any] = {}

    def component(self) -> type[Component[Any]]:
        """The class under test."""
        raise NotImplementedError

    def make(self) -> Any:
        """A component with ``options``."""
        kind = self.component()
        with demanding(f"{kind.__qualname__} cannot be made with {dict(self.options)}"):
            return kind(fill(kind.Params, self.options, kind.__qualname__))

    def test_is_well_named(self) -> None:
        kind = self.component()
        name = getattr(kind, "name", None)
        demand(
            isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9-]*", name),
            f"{kind.__qualname__}.name is what users type: lower case, digits and hyphens, "
            f"not {name!r}",
        )

    def test_is_described(self) -> None:
        kind = self.component()
        own = kind.__doc__ or ""
        line = inspect.cleandoc(own).partition("\n")[0]
        demand(
            line.endswith("."),
            f"{kind.__qualname__} needs a docstring whose first line is one whole sentence: "
            f"qplug plugins show prints it; it is {line!r}",
        )

    def test_parameters_are_options(self) -> None:
        kind = self.component()
        with demanding(f"{kind.__qualname__}.Params cannot be offered to users"):
            found = options(kind.Params)
        for option in found:
            demand(
                option.param.help.endswith("."),
                f"{kind.__qualname__}.Params.{option.name}: its Param needs help that ends with a "
                "full stop",
            )
        self.make()

    def test_parameters_without_default_are_given(self) -> None:
        kind = self.component()
        for field in dataclasses.fields(kind.Params):
            bare = field.default is dataclasses.MISSING
            demand(
                not bare or field.name in self.options,
                f"{kind.__qualname__}.Params.{field.name} has no default: give it one, or give "
                "this contract a value in options",
            )

    def test_the_face_imports_nothing_heavy(self) -> None:
        package, _, inner = self.component().__module__.partition(".")
        if not inner:
            return  # one module is all there is; a package has a face
        heavy = imported_by(package) & set(HEAVY)
        demand(
            not heavy,
            f"import {package} imports {', '.join(sorted(heavy))}: qplug plugins list would wait "
            "for it; import it within the hook, or in the module that needs it",
        )


def imported_by(package: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after ``import package``."""
    face = importlib.import_module(package)
    roots = [str(Path(path).parent) for path in face.__path__]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", f"import sys, {package}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*roots, *filter(None, sys.path)])},
    )
    demand(done.returncode == 0, f"import {package} fails: {done.stderr.strip()[-300:]}")
    return {name.partition(".")[0] for name in done.stdout.split()}


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if one is None or other is None:
        return one is other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pair = [each.detach().clone(memory_format=torch.contiguous_format) for each in (one, other)]
    return torch.equal(*(each.view(-1).view(torch.uint8) for each in pair))


def refusal(action: Any) -> QplugError | None:
    """The QplugError that ``action`` raises, if it does; other errors pass."""
    try:
        action()
    except QplugError as error:
        return error
    return None
