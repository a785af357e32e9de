"""What all tests share: one thread of torch in each process, and processes that start at once."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoints
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result
from hypothesis import settings

if TYPE_CHECKING:
    from pluggy import PluginManager

    from qplug.registry.plugin import Plugin

# Matrices here are small, and threads that wait for a busy core cost seconds. It must be said
# before torch is imported; processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# A developer's own defaults of options are none of a test's.
os.environ["XDG_CONFIG_HOME"] = os.devnull
# Where float models are is noted for the time of the tests alone.
_STATE = tempfile.TemporaryDirectory(prefix="qplug-state-")
os.environ["XDG_STATE_HOME"] = _STATE.name
for _variable in ("QPLUG_DEVICE", "QPLUG_BACKEND", "QPLUG_DATASET"):
    os.environ.pop(_variable, None)
# Seconds after each run; tests of the check ask for it with --check.
os.environ["QPLUG_CHECK"] = "no"

# How long an example takes is the machine's doing. A run gives what it gave before; others are
# looked for with --hypothesis-profile=explore.
settings.register_profile("qplug", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("qplug")

#: Fixtures that tests of several folders use.
pytest_plugins = [
    "browser",
    "hub",
    "chats",
    "checkpoints",
    "hand_made",
    "job_files",
    "small_models",
    "odd_models",
]


def pytest_collection_finish() -> None:
    """What libraries made when they were imported is not looked through for garbage again."""
    gc.collect()
    gc.freeze()


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """Runs ``qplug`` with the given words in this process."""

    def run(*words: object) -> Result:
        from qplug.cli.main import main

        return CliRunner().invoke(main, [str(word) for word in words], prog_name="qplug")

    return run


# --- engines on this machine ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine is installed but for tests of engines: rules are those of the newest version."""
    if not any(request.node.get_closest_marker(mark) for mark in ("engine", "gpu")):
        monkeypatch.setattr("qplug.machine.engines.first_version", lambda distributions: None)
        for name in ("QPLUG_VLLM_PYTHON", "QPLUG_SGLANG_PYTHON"):
            monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub does not answer, so that the dataset of a run does not depend on the network."""
    monkeypatch.setattr("qplug.cli.chosen.hub_answers", lambda seconds: False)


# --- the CPU of the host --------------------------------------------------------------------------

#: The features of the CPU that tests see: all that vLLM's kernels for CPUs are known to ask for.
DECLARED_CPU = ("avx2", "avx512f", "avx512_vnni")


@pytest.fixture(scope="session")
def _cpuinfo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cpu") / "cpuinfo"
    _write_flags(file, DECLARED_CPU)
    return file


def _write_flags(file: Path, flags: Sequence[str]) -> None:
    file.write_text(f"flags\t\t: {' '.join(flags)}\n")


@pytest.fixture(autouse=True)
def declare_cpu(_cpuinfo: Path) -> Iterator[Callable[..., None]]:
    """Declares the features of the CPU in place of the host's: ``declare_cpu("avx2")``.

    A test that declares none sees those of ``DECLARED_CPU``, whatever host it runs on.
    """
    from qplug_vllm import cpu

    declared = False

    def declare(*flags: str) -> None:
        nonlocal declared
        declared = True
        _write_flags(_cpuinfo, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CPUINFO", _cpuinfo)
        yield declare
    if declared:
        _write_flags(_cpuinfo, DECLARED_CPU)


# --- installed plugins ----------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def look_for_plugins_once() -> Iterator[None]:
    """What is installed does not change meanwhile: thousands of registries need not read it again.

    Where a test adds a folder to Python's path, all is read each time.
    """
    from qplug.registry import registry

    path, read = list(sys.path), registry.entry_points
    read_once = cache(read)

    def found(*, group: str) -> EntryPoints:
        return (read_once if sys.path == path else read)(group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", found)
        yield


@pytest.fixture(scope="session", autouse=True)
def make_managers_of_own_plugins_once() -> Iterator[None]:
    """Managers of hooks take half of a registry's time, and thousands of registries are made.

    A plugin whose hooks a test has replaced has a manager of its own, as has one that is traced.
    """
    from qplug.registry import registry

    make = registry._new_manager
    made: dict[tuple[object, ...], PluginManager] = {}

    def manager(plugin: Plugin, plugged: object) -> PluginManager:
        if not plugin.ships_with_qplug or "QPLUG_TRACE" in os.environ:
            return make(plugin, plugged)
        hooks = [hook for hook in vars(plugged).values() if hasattr(hook, f"{registry.GROUP}_impl")]
        key = (plugin.name, plugged, *hooks)
        if key not in made:
            made[key] = make(plugin, plugged)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_new_manager", manager)
        yield


# --- processes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How processes ended: their exit codes, by rank, and all they printed."""

    codes: list[int]
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@dataclass(frozen=True)
class Started:
    """Processes that run. Wait for their end before others are started."""

    ids: list[int]
    log: Path
    hear: IO[str]
    began: float

    def wait(self) -> Ended:
        codes = json.loads(self.hear.readline())
        stdout, stderr = (Path(f"{self.log}.{name}").read_text() for name in ("stdout", "stderr"))
        return Ended(codes, stdout, stderr, time.monotonic() - self.began)


@dataclass(frozen=True)
class Starter:
    """``start("eval", "qplug:demo")`` is that command line, ``start("-c", code)`` is Python's.

    In ``count`` processes, in ``folder``. If one fails, the others are ended after ``patience``
    seconds, by default as soon as torchrun does; never if it is None.
    """

    starter: subprocess.Popen[str]
    logs: Path

    def __call__(
        self,
        *words: object,
        count: int = 1,
        folder: Path | None = None,
        patience: float | None = 0.1,
        **environment: str,
    ) -> Started:
        assert self.starter.stdin is not None
        assert self.starter.stdout is not None
        log = self.logs / str(time.monotonic_ns())
        told = {"words": [str(word) for word in words], "count": count, "log": str(log)}
        environment = {"HF_HUB_OFFLINE": "1", **environment}
        told |= {"folder": str(folder or Path.cwd()), "environment": environment}
        self.starter.stdin.write(json.dumps({**told, "patience": patience}) + "\n")
        self.starter.stdin.flush()
        ids = json.loads(self.starter.stdout.readline())
        return Started(ids, log, self.starter.stdout, time.monotonic())


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts processes that have torch and transformers imported: it costs no seconds then."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", Path(__file__).with_name("starter.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as starter:
        yield Starter(starter, tmp_path_factory.mktemp("logs"))
        assert starter.stdin is not None
        starter.stdin.close()
