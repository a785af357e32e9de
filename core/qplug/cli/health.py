"""What ``qplug doctor`` looks at: each check returns findings, and imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from qplug.api import Server
from qplug.cli.hub_access import endpoint, hub_answers, is_offline
from qplug.errors import QplugError, reason
from qplug.files.regular import read_text
from qplug.machine.engines import find_engine, python_variable
from qplug.machine.gpus import installed_gpus
from qplug.machine.host_memory import available_memory
from qplug.registry.registry import Registry

_GB = 10**9
_LITTLE_DISK = 10 * _GB  # bytes
_LITTLE_MEMORY = 4 * _GB
_TIMEOUT = 3  # seconds


@dataclass(frozen=True)
class Finding:
    """A line of ``qplug doctor``: what was looked at, its state, and what to do about it.

    ``advice`` is empty if nothing is to be done.
    """

    name: str
    state: Literal["ok", "warning", "broken"]
    text: str
    advice: str = ""


def machine_findings() -> Iterator[Finding]:
    """Yields the findings on Python, torch, GPUs, memory and disk."""
    yield Finding("Python", "ok", f"{sys.version.split()[0]}, {sys.executable}")
    yield from _torch()
    yield _memory()
    yield _disk()


# --- torch and GPUs -------------------------------------------------------------------------------


def _torch() -> Iterator[Finding]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        yield Finding("torch", "broken", "is not installed", "pip install torch")
        return
    try:
        text = read_text(Path(spec.origin).with_name("version.py"), 1 << 16)
        release = version("torch")
    except (OSError, QplugError, PackageNotFoundError) as error:
        yield Finding("torch", "broken", reason(error), "install torch again")
        return
    found = re.search(r"^cuda\b.*?=\s*'([^']+)'", text, re.MULTILINE)
    cuda = found[1] if found else None
    gpus = installed_gpus()
    built = f"{release}, {f'built for CUDA {cuda}' if cuda else 'built without CUDA'}"
    if gpus and cuda is None:
        yield Finding("torch", "warning", built, "install a torch with CUDA to use the GPUs")
    else:
        yield Finding("torch", "ok", built)
    for gpu in gpus:
        text = f"{gpu.name}, {gpu.memory / 2**30:.0f} GiB, {gpu.architecture}"
        yield Finding("GPU", "ok", text)
    if not gpus and cuda is not None:
        advice = "check the driver with nvidia-smi, or use --device cpu"
        yield Finding("GPU", "warning", "none that nvidia-smi lists", advice)
    elif not gpus:
        yield Finding("GPU", "ok", "none; qplug runs on the CPU")


# --- engines --------------------------------------------------------------------------------------


def engine_findings(registry: Registry) -> Iterator[Finding]:
    """Yields the findings on the engines that plugins have a server for."""
    exporters = registry.only("exporter").exporters
    engines = [engine for name in exporters if (engine := exporters[name].engine) is not None]
    servers = {engine.server.package: engine.server for engine in engines if engine.server}
    for server in servers.values():
        yield _engine(server)


def _engine(server: Server) -> Finding:
    engine, variable = server.package, python_variable(server.package)
    found = find_engine(server)
    where = f"for {variable}={found.python}" if found.python else "in this environment"
    if not found.runs:
        advice = f"set {variable} to the Python that has {engine}"
        return Finding(engine, "warning", f"{found.python} is no Python that runs", advice)
    if found.version is not None:
        return Finding(engine, "ok", f"{found.version} {where}")
    advice = f"to serve with it, install it or set {variable} to the Python that has it"
    state: Literal["ok", "warning"] = "warning" if found.python else "ok"
    return Finding(engine, state, f"is not installed {where}", advice)


# --- memory and disk ------------------------------------------------------------------------------


def _memory() -> Finding:
    free = available_memory()
    if free is None:
        return Finding("memory", "ok", "the system does not say how much is free")
    text = f"{free / _GB:.1f} GB free"
    if free < _LITTLE_MEMORY:
        return Finding("memory", "warning", text, "end other programs before a large model")
    return Finding("memory", "ok", text)


def _disk() -> Finding:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    text = f"{free / _GB:.1f} GB free in {folder}"
    if free < _LITTLE_DISK:
        return Finding("disk", "warning", text, "write to another disk with --out")
    return Finding("disk", "ok", text)


# --- the Hub --------------------------------------------------------------------------------------


def hub_findings() -> Iterator[Finding]:
    """Yields the findings on the token for the Hub, and on the way to the Hub."""
    if _token() is None:
        advice = "for gated models: hf auth login, or set HF_TOKEN"
        yield Finding("Hub token", "ok", "none", advice)
    else:
        yield Finding("Hub token", "ok", f"in {_token()}")
    if is_offline():
        yield Finding("Hub", "ok", "not asked, since HF_HUB_OFFLINE is set")
    elif hub_answers(_TIMEOUT):
        yield Finding("Hub", "ok", f"{endpoint()} answers")
    else:
        advice = "check the network and HTTPS_PROXY, or use folders on this machine"
        yield Finding("Hub", "warning", f"{endpoint()} cannot be reached", advice)


def _token() -> str | None:
    """Returns where the token for the Hub is: the name of a variable or a file."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable):
            return variable
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    named = os.environ.get("HF_TOKEN_PATH") or f"{home}/token"
    file = Path(os.path.expanduser(named))  # noqa: PTH111 - Path's raises for a user without a home
    return str(file) if file.is_file() else None


# --- plugins --------------------------------------------------------------------------------------


def plugin_findings(registry: Registry) -> Iterator[Finding]:
    """Yields the findings on plugins, whose packages are imported, and their hooks checked.

    Algorithms and datasets would import torch, for seconds: ``qplug plugins check`` imports them.
    """
    registry = registry.only("exporter", "reader").load().load_commands()
    usable = [plugin for plugin in registry.plugins if plugin.status == "ok"]
    advice = "to import their algorithms too: qplug plugins check"
    yield Finding("plugins", "ok", f"{len(usable)} load", advice)
    for plugin in registry.plugins:
        if plugin.error:
            text = f"{plugin}: {reason(plugin.error)}"
            if plugin.ships_with_qplug:
                yield Finding("plugin", "broken", text, "install qplug again")
            else:
                advice = f"to run without it: qplug -p no:{plugin.name}"
                yield Finding("plugin", "warning", text, advice)
