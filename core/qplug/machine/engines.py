"""Finds the version of an engine that is installed, for this Python or for another one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from qplug.api import Server

#: Prints the version of the first distribution that is installed, or nothing.
_VERSION = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""
_TIMEOUT = 30  # seconds


@dataclass(frozen=True)
class Installation:
    """What is installed of an engine.

    ``python``: the Python that was asked, named by the user or by a variable; None if this Python
    was. ``runs`` is false if that Python does not run. ``version``: None if the engine is not
    installed.
    """

    version: str | None
    python: str | None = None
    runs: bool = True


def python_variable(package: str) -> str:
    """The environment variable that names the Python that has the engine ``package``."""
    return f"QPLUG_{package.upper()}_PYTHON"


def find_engine(server: Server, python: str | None = None) -> Installation:
    """Returns what is installed of the engine that ``server`` belongs to.

    It is looked for in ``python``, by default in the Python that the variable of the engine names,
    else in the Python that runs. A variable with PATH after its name, ``QPLUG_VLLM_PYTHONPATH``,
    says where that Python has packages.
    """
    variable = python_variable(server.package)
    named = python or os.environ.get(variable)
    distributions = server.distributions or (server.package,)
    if named is None:
        return Installation(first_version(distributions))
    packages = os.environ.get(f"{variable}PATH")
    try:
        done = subprocess.run(  # noqa: S603 - the user names it
            [named, "-c", _VERSION, *distributions],
            capture_output=True,
            text=True,
            check=True,
            timeout=_TIMEOUT,
            env={**os.environ, **({"PYTHONPATH": packages} if packages else {})},
        )
    except (OSError, subprocess.SubprocessError):
        return Installation(None, named, runs=False)
    return Installation(done.stdout.strip() or None, named)


def first_version(distributions: Iterable[str]) -> str | None:
    """The version of the first of ``distributions`` that this Python has; None if it has none."""
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None
