"""Which command serves a folder: the engine's own server, with the options this folder needs."""

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
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import read_json
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.output.manifest import read_manifest
from qplug.reading.folder import open_folder
from qplug.registry.registry import Registry


@dataclass(frozen=True)
class Serving:
    """A server that can be started: what to run, and where it will answer.

    ``rules``: the backend whose rules the folder is checked by, None for the one that wrote it.
    ``warnings``: what the engine gets wrong in silence on this machine.
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
        """What clients call the model."""
        return self.folder.resolve().name

    @property
    def command(self) -> list[str]:
        """The words of the command. What the user passes comes last, and wins."""
        address = ["--host", self.host, "--port", str(self.port)]
        named = [self.server.folder_option, str(self.folder), "--served-model-name", self.name]
        return [self.python, "-m", self.server.module, *named, *address, *self.arguments]

    @property
    def curl(self) -> str:
        """A line for the shell that asks the server for some text."""
        body = json.dumps({"model": self.name, "prompt": "Once upon a time", "max_tokens": 32})
        url = f"http://{self.host}:{self.port}/v1/completions"
        header = "Content-Type: application/json"
        return shlex.join(["curl", url, "-H", header, "-d", body])

    def require_engine(self) -> None:
        """Raises QplugError if the engine is not installed for ``python``."""
        package = self.server.package
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
        try:
            found = subprocess.run([self.python, "-c", code], check=False).returncode == 0  # noqa: S603
        except OSError:
            found = False
        if not found:
            raise QplugError(
                f"{package} is not installed for {self.python}: install it there, or name the "
                f"python of the environment that has it with --python or {_variable(self.server)}"
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
    """How ``folder`` is served by ``backend``, by default the one that it was written for.

    ``python``: that of the engine's environment; by default what QPLUG_<ENGINE>_PYTHON names, or
    this one. Raises QplugError if no engine goes with the backend.
    """
    registry = session.registry
    path = find_model(folder)
    config = read_json(path / "config.json")
    manifest = read_manifest(path)
    name = backend or (manifest.backend if manifest else None)
    engine = registry.exporters[name].engine if name else None
    if engine is None or engine.server is None or name is None:
        engines = _names_of_engines(registry)
        told = f"was written for {name}, which is no engine" if name else "does not say for whom"
        raise QplugError(f"{folder}: {told}; say --backend {' or '.join(engines)}")
    needed = engine.serve_arguments(config)
    found = python or os.environ.get(_variable(engine.server)) or sys.executable
    if session.trust_remote_code:
        needed = (*needed, "--trust-remote-code")
    rules: str | None = name
    warnings: tuple[str, ...] = ()
    try:
        opened = open_folder(folder, session, backend=name)
    except QplugError:
        rules = None  # a format of its own, such as GPTQ's, which engines read beside theirs
    else:
        warnings = tuple(engine.serve_warnings(opened.schemes, opened.kv_cache))
    words = (*needed, *arguments)
    return Serving(path, name, rules, engine.server, found, words, host, port, warnings)


def _names_of_engines(registry: Registry) -> list[str]:
    """The backends whose engine has a server that can be started."""
    engines = {name: registry.exporters[name].engine for name in registry.exporters}
    return [name for name, engine in engines.items() if engine and engine.server is not None]


def _variable(server: Server) -> str:
    return f"QPLUG_{server.package.upper()}_PYTHON"
