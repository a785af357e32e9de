"""``qplug doctor`` says of each part of the machine whether it works, and what to do if not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
from dataclasses import replace
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from qplug.api import Server
from qplug.cli import health
from qplug.cli.health import (
    Finding,
    engine_findings,
    hub_findings,
    machine_findings,
    plugin_findings,
)
from qplug.cli.main import main
from qplug.machine import engines
from qplug.machine.gpus import Gpu
from qplug.registry.plugin import Plugin
from qplug.registry.registry import Registry
from qplug_vllm.engine import VLLM

if TYPE_CHECKING:
    from click.testing import Result

H100 = Gpu("NVIDIA H100", 80 << 30, "sm90")


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without GPUs, engines and a token, which does not ask the Hub."""
    monkeypatch.setattr(health, "installed_gpus", lambda: [])
    monkeypatch.setattr(health, "available_memory", lambda: 32 * 10**9)
    monkeypatch.setattr(engines, "first_version", lambda names: None)
    for name in ("QPLUG_VLLM_PYTHON", "QPLUG_SGLANG_PYTHON", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_TOKEN_PATH", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def doctor(*words: str, plugins: list[Plugin] | None = None) -> Result:
    registry = shipped() if plugins is None else Registry(plugins)
    return CliRunner().invoke(main, ["doctor", *words], prog_name="qplug", obj=registry)


def shipped() -> Registry:
    return Registry.installed(only_shipped=True)


def found(name: str) -> list[Finding]:
    findings = [*machine_findings(), *hub_findings(), *engine_findings(shipped())]
    return [each for each in findings if each.name == name]


def broken(ships: bool) -> Plugin:
    def cannot() -> object:
        raise ImportError("no module x")

    return Plugin("bad", "bad 1.0", "face_bad", cannot, ships_with_qplug=ships)


def test_a_machine_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    # A torch that is built for CUDA has a driver to look for.
    monkeypatch.setattr("qplug.cli.health.read_text", lambda *_: "cuda = None\n")
    monkeypatch.setattr("qplug.cli.health.installed_gpus", lambda: [])
    result = doctor()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * len(lines)
    assert [line[9:].split("  ")[0] for line in lines] == [
        *("Python", "torch", "GPU", "memory", "disk"),
        *("Hub token", "Hub", "sglang", "vllm", "plugins"),
    ]


def test_as_json() -> None:
    findings = json.loads(doctor("--json").stdout)
    assert findings[0] == {
        "name": "Python",
        "state": "ok",
        "text": f"{sys.version.split()[0]}, {sys.executable}",
        "advice": "",
    }


@pytest.mark.parametrize(
    ("ships", "code", "line"),
    [
        (
            True,
            1,
            "broken   plugin     bad (bad 1.0): ImportError: no module x; install qplug again",
        ),
        (
            False,
            0,
            "warning  plugin     bad (bad 1.0): ImportError: no module x; to run without it: qplug "
            "-p no:bad",
        ),
    ],
)
def test_a_plugin_that_does_not_load(ships: bool, code: int, line: str) -> None:
    result = doctor(plugins=[broken(ships)])
    assert result.exit_code == code
    assert result.stdout.splitlines()[-1] == line


def test_plugins_that_load() -> None:
    (finding,) = plugin_findings(Registry.installed(only_shipped=True))
    assert finding.state == "ok"
    assert finding.text.endswith(" load")


def test_doctor_imports_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from qplug.cli.main import main; "
        "CliRunner().invoke(main, ['doctor']); sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("cuda", ["None", "'12.8'"])
@pytest.mark.parametrize("gpus", [[], [H100]])
def test_torch_and_gpus(
    cuda: str, gpus: list[Gpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2'\ncuda: Optional[str] = {cuda}\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(health.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(health, "installed_gpus", lambda: gpus)
    (torch,), shown = found("torch"), found("GPU")
    has_cuda = cuda != "None"
    assert torch.text.endswith("built for CUDA 12.8" if has_cuda else "built without CUDA")
    assert torch.state == ("warning" if gpus and not has_cuda else "ok")
    assert [each.text for each in shown if gpus] == ["NVIDIA H100, 80 GiB, sm90"] * len(gpus)
    assert [each.state for each in shown] == ["warning" if has_cuda and not gpus else "ok"]


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.importlib.util, "find_spec", lambda name: None)
    assert found("torch") == [Finding("torch", "broken", "is not installed", "pip install torch")]
    assert doctor().exit_code == 1


def test_an_engine_of_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("vllm", "m", "--model", distributions=("no-such-package", "click"))
    monkeypatch.setattr(VLLM, "server", server)
    monkeypatch.setenv("QPLUG_VLLM_PYTHON", sys.executable)
    (finding,) = found("vllm")
    assert finding.state == "ok"
    assert finding.text.endswith(f" for QPLUG_VLLM_PYTHON={sys.executable}")
    monkeypatch.setattr(VLLM, "server", replace(server, distributions=("no-such-package",)))
    (finding,) = found("vllm")
    assert (finding.state, finding.text[:16]) == ("warning", "is not installed")
    monkeypatch.setenv("QPLUG_VLLM_PYTHON", "/no/such/python")
    (finding,) = found("vllm")
    assert finding.text == "/no/such/python is no Python that runs"
    assert finding.advice == "set QPLUG_VLLM_PYTHON to the Python that has vllm"


def test_an_engine_in_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "first_version", lambda names: "0.32.0")
    assert found("vllm") == [Finding("vllm", "ok", "0.32.0 in this environment")]


def test_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "available_memory", lambda: 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * 10**9))
    assert [(each.state, each.text[:11]) for each in (*found("memory"), *found("disk"))] == [
        ("warning", "1.0 GB free"),
        ("warning", "2.0 GB free"),
    ]


def test_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("Hub token")[0].text == "none"
    (tmp_path / "token").write_text("hf_secret")
    assert found("Hub token")[0].text == f"in {tmp_path / 'token'}"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert found("Hub token")[0].text == "in HF_TOKEN"
    assert "secret" not in doctor().output


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (urllib.error.HTTPError("u", 503, "busy", Message(), None), "ok"),
        (urllib.error.URLError("Name or service not known"), "warning"),
        (TimeoutError(), "warning"),
    ],
)
def test_the_hub(error: Exception, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("urllib.request.urlopen", fail)
    (finding,) = found("Hub")
    assert finding.state == state
    assert "Name or service" not in finding.text
