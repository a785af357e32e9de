"""Finds the command that serves a folder: the engine's server with the options it needs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qplug.api import Server
from qplug.api.joined import JoinedEngine
from qplug.checkpoint.config_file import read_config
from qplug.checkpoint.locate import as_word, find_model
from qplug.errors import QplugError
from qplug.machine.engines import python_variable
from qplug.machine.session import Session
from qplug.output.manifest import read_manifest
from qplug.reading.engine_version import choose_version
from qplug.reading.folder import open_folder
from qplug.registry.registry import Registry


@dataclass(frozen=True)
class Serving:
    """A server that can be started: its command, and the address at which it will answer.

    ``rules``: the backend by whose rules ``verify`` checks the folder; None for the backend that
    wrote it. ``warnings``: silent faults of the engine on this machine, as sentences. ``choice``
    says which engine was chosen, and why, if the folder was written for several.
    """

    folder: Path
    backend: str
    rules: str | None
    server: Server
    python: str
    arguments: tuple[str, ...]
    host: str
    port: int
    warnings: tuple[str, ...] = ()
    choice: str | None = None

    @property
    def name(self) -> str:
        """The name of the model in requests of clients."""
        return self.folder.resolve().name

    @property
    def command(self) -> list[str]:
        """The words of the command; the user's arguments come last, so they win."""
        address = ["--host", self.host, "--port", str(self.port)]
        folder = [self.server.folder_option, as_word(self.folder)]
        # After a space the name of a folder that begins with a dash would be an option.
        flag = "--served-model-name"
        name = [f"{flag}={self.name}"] if self.name.startswith("-") else [flag, self.name]
        return [self.python, "-m", self.server.module, *folder, *name, *address, *self.arguments]

    @property
    def curl(self) -> str:
        """A shell command that asks the server for some text."""
        body = json.dumps({"model": self.name, "prompt": "Once upon a time", "max_tokens": 32})
        url = f"http://{self.host}:{self.port}/v1/completions"
        header = "Content-Type: application/json"
        return shlex.join(["curl", url, "-H", header, "-d", body])

    def require_engine(self) -> None:
        """Raise QplugError if the engine is not installed for ``python``."""
        package = self.server.package
        if not _is_installed(package, self.python):
            raise QplugError(
                f"{package} is not installed for {self.python}: install it there, or name the "
                f"Python that has {package} with --python or {python_variable(self.server.package)}"
            )


def _is_installed(package: str, python: str) -> bool:
    """Whether the interpreter ``python`` runs and finds ``package``."""
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], check=False).returncode == 0  # noqa: S603
    except OSError:
        return False


def _interpreter(server: Server, python: str | None) -> str:
    return python or os.environ.get(python_variable(server.package)) or sys.executable


def find_serving(
    folder: str,
    session: Session,
    *,
    backend: str | None = None,
    python: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    arguments: Sequence[str] = (),
) -> Serving:
    """Find the command that serves ``folder`` with the engine of ``backend``.

    By default ``backend`` is the one that wrote the folder. If that is several that are joined, it
    is the first of them whose engine is installed, else the first. ``python`` is the interpreter
    that has the engine; by default the one that QPLUG_<ENGINE>_PYTHON names, else the one that runs
    qplug. ``arguments`` are passed on to the engine. Raises QplugError if the backend has no engine
    with a server.
    """
    registry = session.registry
    path = find_model(folder)
    config = read_config(path)
    manifest = read_manifest(path)
    name = backend or (manifest.backend if manifest else None)
    engine = registry.exporters[name].engine if name else None
    choice = None
    if isinstance(engine, JoinedEngine) and name is not None:
        name, choice = _chosen(engine, name, python)
        engine = engine.engines[name]
    if engine is None or engine.server is None or name is None:
        engines = _names_of_engines(registry)
        why = f"was written for {name}, which is no engine" if name else "names no engine"
        raise QplugError(f"{folder}: {why}; name one with --backend {' or '.join(engines)}")
    version = choose_version(engine, name, manifest, python=python)
    engine = engine.at(version.version)
    server = engine.server
    assert server is not None
    needed = engine.serve_arguments(config)
    interpreter = _interpreter(server, python)
    if session.trust_remote_code:
        needed = (*needed, "--trust-remote-code")
    rules: str | None = name
    warnings: tuple[str, ...] = ()
    try:
        opened = open_folder(folder, session, backend=name)
    except QplugError:
        rules = None  # another backend's format, such as GPTQ, which the engine reads too
    else:
        warnings = tuple(engine.serve_warnings(opened.schemes, opened.kv_cache))
    words = (*needed, *arguments)
    return Serving(path, name, rules, server, interpreter, words, host, port, warnings, choice)


def _chosen(joined: JoinedEngine, written: str, python: str | None) -> tuple[str, str]:
    """The backend among those of ``joined`` whose engine serves, and a sentence that says why.

    ``written``: the name of the joined backends. ``python`` as in ``find_serving``.
    """
    servers = {name: each.server for name, each in joined.engines.items() if each.server}
    if not servers:
        raise QplugError(f"{written}: none of these backends has an engine with a server")
    installed = [
        name
        for name, server in servers.items()
        if _is_installed(server.package, _interpreter(server, python))
    ]
    name = next(iter(installed or servers))
    others = " or ".join(f"--backend {each}" for each in servers if each != name)
    why = "which is installed" if installed else "though no engine of them is installed"
    other = f"; {others} takes another one" if others else ""
    return name, f"written for {written}, to be served with {name}, {why}{other}"


def _names_of_engines(registry: Registry) -> list[str]:
    """The names of the backends whose engine has a server."""
    engines = {name: registry.exporters[name].engine for name in registry.exporters}
    return [name for name, engine in engines.items() if engine and engine.server is not None]
