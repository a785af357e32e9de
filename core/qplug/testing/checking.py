"""The checks that contracts share; each fails with a sentence that says what to correct."""

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

#: Packages that the ``__init__.py`` of a plugin must not import, since listing plugins would then
#: be slow for everyone.
HEAVY = ("torch", "transformers", "datasets")


def demand(condition: object, sentence: str) -> None:
    """Raises AssertionError with ``sentence`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(sentence)


@contextmanager
def demanding(sentence: str) -> Iterator[None]:
    """A context that turns an exception into an AssertionError that begins with ``sentence``."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{sentence}: {type(error).__name__}: {error}") from error


class ComponentContract:
    """The tests of every component. Subclass the contract of one kind instead of this class."""

    #: Parameters to test with, as a user would pass them; other parameters have their defaults.
    options: Mapping[str, Any] = {}

    def component(self) -> type[Component[Any]]:
        """Returns the class under test."""
        raise NotImplementedError

    def make(self) -> Any:
        """Returns an instance of the class under test, with ``options``."""
        component = self.component()
        with demanding(f"{component.__qualname__} cannot be created with {dict(self.options)}"):
            return component(fill(component.Params, self.options, component.__qualname__))

    def test_is_well_named(self) -> None:
        component = self.component()
        name = getattr(component, "name", None)
        demand(
            isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9-]*", name),
            f"{component.__qualname__}.name is what users type: lower case, digits and hyphens, "
            f"not {name!r}",
        )

    def test_is_described(self) -> None:
        component = self.component()
        docstring = component.__doc__ or ""
        line = inspect.cleandoc(docstring).partition("\n")[0]
        demand(
            line.endswith("."),
            f"{component.__qualname__} needs a docstring whose first line is one whole sentence: "
            f"qplug plugins show prints it; it is {line!r}",
        )

    def test_parameters_are_options(self) -> None:
        component = self.component()
        with demanding(f"{component.__qualname__}.Params cannot be offered to users"):
            parameters = options(component.Params)
        for parameter in parameters:
            demand(
                parameter.param.help.endswith("."),
                f"{component.__qualname__}.Params.{parameter.name}: its Param needs help that "
                "ends with a full stop",
            )
        self.make()

    def test_parameters_without_default_are_given(self) -> None:
        component = self.component()
        for field in dataclasses.fields(component.Params):
            has_default = field.default is not dataclasses.MISSING
            demand(
                has_default or field.name in self.options,
                f"{component.__qualname__}.Params.{field.name} has no default: give it one, or "
                "give this contract a value in options",
            )

    def test_the_face_imports_nothing_heavy(self) -> None:
        package, _, inner = self.component().__module__.partition(".")
        if not inner:
            return  # the plugin is a single module, without an __init__.py
        heavy = imported_by(package) & set(HEAVY)
        demand(
            not heavy,
            f"import {package} imports {', '.join(sorted(heavy))}, which makes qplug plugins list "
            "slow; import it inside the hook, or in the module that needs it",
        )


def imported_by(package: str) -> set[str]:
    """Returns the top-level modules that a new interpreter has loaded after ``import package``."""
    module = importlib.import_module(package)
    roots = [str(Path(path).parent) for path in module.__path__]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", f"import sys, {package}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*roots, *filter(None, sys.path)])},
    )
    demand(done.returncode == 0, f"import {package} fails: {done.stderr.strip()[-300:]}")
    return {name.partition(".")[0] for name in done.stdout.split()}


def same(first: Tensor | None, second: Tensor | None) -> bool:
    """Returns whether two tensors agree in dtype, shape and every bit, or both are None."""
    if first is None or second is None:
        return first is second
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(_bytes_of(first), _bytes_of(second))


def _bytes_of(tensor: Tensor) -> Tensor:
    contiguous = tensor.detach().clone(memory_format=torch.contiguous_format)
    return contiguous.view(-1).view(torch.uint8)


def refusal(action: Any) -> QplugError | None:
    """Returns the QplugError that calling ``action`` raises, or None; other errors pass through."""
    try:
        action()
    except QplugError as error:
        return error
    return None
