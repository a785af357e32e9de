"""GPUs by name, and the GPUs of the machine as NVIDIA's driver lists them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from qplug.api.gpus import DEVICES, GPUS, Column
from qplug.errors import QplugError
from qplug.machine import gpus
from qplug.machine.gpus import Gpu, column_for, installed_gpus

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs a driver that prints the given lines."""

    def install(lines: str) -> None:
        def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(words, 0, stdout=lines)

        monkeypatch.setattr(gpus, "which", lambda _: "/usr/bin/nvidia-smi")
        monkeypatch.setattr(gpus.subprocess, "run", run)

    return install


@pytest.mark.parametrize("name", GPUS)
def test_every_name_has_a_column(name: str) -> None:
    assert column_for(name).device in DEVICES


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("h100", "sm90"),
        ("NVIDIA GeForce RTX 4090", "sm89"),
        ("rtx-3090", "sm80"),
        ("sm100", "sm100"),
        ("CPU", "cpu"),
        ("sm86", "sm80"),
    ],
)
def test_a_name(name: str, device: str) -> None:
    assert column_for(name).device == device


def test_a_gpu_that_no_table_has_gets_the_nearest_with_a_remark() -> None:
    assert column_for("5090") == Column(
        "sm100", "5090 is sm120; no table has it, the nearest is sm100, which may differ"
    )
    assert column_for("L40S").remark == ""


def test_an_unknown_name() -> None:
    with pytest.raises(QplugError, match=r"^--gpu H10: not a known GPU\. Did you mean 'H100'\?"):
        column_for("H10")
    with pytest.raises(QplugError, match=r"not a known GPU\. There are: A100, "):
        column_for("?")


def test_auto_looks_at_the_machine(driver: Callable[[str], None]) -> None:
    driver("NVIDIA H100 80GB HBM3, 81559, 9.0\nNVIDIA H100 80GB HBM3, 81559, 9.0\n")
    gpu = Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, "sm90")
    assert installed_gpus() == [gpu, gpu]
    assert column_for("auto") == Column("sm90", "NVIDIA H100 80GB HBM3: sm90")
    driver("NVIDIA GeForce RTX 5090, 32607, 12.0\n")
    assert column_for("auto").device == "sm100"
    assert "is sm120" in column_for("auto").remark
    driver("Tesla P100, 16384, 6.0\n")
    with pytest.raises(QplugError, match="Tesla P100 is sm60, which no engine's table has"):
        column_for("auto")


@pytest.mark.parametrize("lines", ["", "no devices were found", "x, [N/A], 9.0"])
def test_auto_without_a_gpu_is_the_cpu(lines: str, driver: Callable[[str], None]) -> None:
    driver(lines)
    assert column_for("auto").device == "cpu"


def test_a_driver_that_fails(
    driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 5)

    driver("")
    monkeypatch.setattr(gpus.subprocess, "run", fail)
    assert installed_gpus() == []
    monkeypatch.setattr(gpus, "which", lambda _: None)
    assert installed_gpus() == []


def test_schemes_of_a_gpu_by_name(cli: Cli) -> None:
    by_name = cli("schemes", "--backend", "vllm", "--gpu", "H100")
    assert by_name.exit_code == 0
    assert by_name.stdout == cli("schemes", "--backend", "vllm", "--gpu", "sm90").stdout
    near = cli("schemes", "--backend", "vllm", "--gpu", "3090")
    assert near.stderr == "3090 is sm86; no table has it, the nearest is sm80, which may differ\n"
    assert cli("schemes", "--gpu", "H10").stderr.startswith("Error: --gpu H10: not a known GPU.")
