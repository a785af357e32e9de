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
    wrote it. ``warnings``: silent faults of the engine on this machine, as sentences.
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
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
        try:
            installed = subprocess.run([self.python, "-c", code], check=False).returncode == 0  # noqa: S603
        except OSError:
            installed = False
        if not installed:
            raise QplugError(
                f"{package} is not installed for {self.python}: install it there, or name the "
                f"Python that has {package} with --python or {python_variable(self.server.package)}"
            )


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

    By default ``backend`` is the one that wrote the folder. ``python`` is the interpreter that has
    the engine; by default the one that QPLUG_<ENGINE>_PYTHON names, else the one that runs qplug.
    ``arguments`` are passed on to the engine. Raises QplugError if the backend has no engine with a
    server.
    """
    registry = session.registry
    path = find_model(folder)
    config = read_config(path)
    manifest = read_manifest(path)
    name = backend or (manifest.backend if manifest else None)
    engine = registry.exporters[name].engine if name else None
    if engine is None or engine.server is None or name is None:
        engines = _names_of_engines(registry)
        why = f"was written for {name}, which is no engine" if name else "names no engine"
        raise QplugError(f"{folder}: {why}; name one with --backend {' or '.join(engines)}")
    version = choose_version(engine, name, manifest, python=python)
    engine = engine.at(version.version)
    server = engine.server
    assert server is not None
    needed = engine.serve_arguments(config)
    interpreter = python or os.environ.get(python_variable(server.package)) or sys.executable
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
    return Serving(path, name, rules, server, interpreter, words, host, port, warnings)


def _names_of_engines(registry: Registry) -> list[str]:
    """The names of the backends whose engine has a server."""
    engines = {name: registry.exporters[name].engine for name in registry.exporters}
    return [name for name, engine in engines.items() if engine and engine.server is not None]
