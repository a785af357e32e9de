"""What the engine tests share: the engines' own Pythons, their settings, and what was measured.

qplug runs here; engines run in other processes and other environments, and are only talked to.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from engine_cases import cases_for_gpus, every_case, some_cases

from qplug_vllm.cpu import cpu_flags

if TYPE_CHECKING:
    from collections.abc import Iterator


#: Features of a CPU that decide which of vLLM's libraries and kernels are used.
TOLD = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"}


@dataclass
class Results:
    """What was found, row by row, what failed, and what was not tried and why."""

    header: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """As JSON, into the file that QPLUG_ENGINE_RESULTS names: whatever there is by now."""
        if "QPLUG_ENGINE_RESULTS" not in os.environ:
            return
        told = {
            "date": date.today().isoformat(),
            "qplug": version("qplug"),
            "machine": ", ".join([platform.machine(), *sorted(TOLD & cpu_flags())]),
            **self.header,
            "rows": sorted(self.rows, key=lambda row: row["case"]),
            "failed": dict(sorted(self.failed.items())),
            "left out": dict(sorted(self.left_out.items())),
        }
        text = json.dumps(told, indent=1, ensure_ascii=False)
        Path(os.environ["QPLUG_ENGINE_RESULTS"]).write_text(text + "\n", "utf-8")


_RESULTS = pytest.StashKey[Results]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case``: those that stand for all, or all. Tables are read only where engines are wanted."""
    unread = pytest.mark.skip(reason="cases are read for -m engine and -m gpu alone")
    if "case" in metafunc.fixturenames:
        wanted = metafunc.config.option.markexpr in ("engine", "gpu")
        full = os.environ.get("QPLUG_ENGINE_TESTS") == "full"
        cases = (
            (every_case() if full else some_cases())
            if wanted
            else [pytest.param(None, marks=unread)]
        )
        if metafunc.config.option.markexpr == "gpu":
            cases = list(dict.fromkeys([*cases, *cases_for_gpus()]))
        metafunc.parametrize("case", cases, ids=str, scope="module")


@pytest.fixture(autouse=True)
def declare_cpu() -> None:
    """Leaves the CPU of the host in place: an engine runs on it, with the kernels that it has."""


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Iterator[Results]:
    """Told at the end of the run; the file that QPLUG_ENGINE_RESULTS names gets them as JSON."""
    found = pytestconfig.stash.setdefault(_RESULTS, Results())
    yield found
    found.write()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    found = config.stash.get(_RESULTS, Results())
    if found.rows:
        terminalreporter.section("mean |difference of prompt logprobs|, engine and qplug's reader")
    for row in found.rows:
        cells = "  ".join(f"{key} {value}" for key, value in row.items() if key != "case")
        terminalreporter.line(f"{row['case']:36} {cells}")
    for case, error in sorted(found.failed.items()):
        terminalreporter.line(f"{case:36} failed: {error}")
    if found.left_out:
        terminalreporter.section(f"{len(found.left_out)} left out: this machine cannot run them")
    for case, reason in sorted(found.left_out.items()):
        terminalreporter.line(f"{case:36} {reason}")
