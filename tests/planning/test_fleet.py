"""GPUs by name and number."""

from __future__ import annotations

import pytest

from qplug.api.gpus import GPUS
from qplug.errors import QplugError
from qplug.machine.gpus import Gpu
from qplug.planning import fleet
from qplug.planning.fleet import find_fleet


@pytest.mark.parametrize(
    ("text", "title", "device", "gib"),
    [
        ("H100", "H100", "sm90", 80),
        ("h100x2", "H100x2", "sm90", 80),
        ("2xH100", "H100x2", "sm90", 80),
        ("8 x B200", "B200x8", "sm100", 180),
        ("RTX 4090", "4090", "sm89", 24),
        ("RTX4090x2", "4090x2", "sm89", 24),
        ("2x4090", "4090x2", "sm89", 24),
        ("A100-40x4", "A100-40x4", "sm80", 40),
        ("PRO 6000", "PRO 6000", "sm100", 96),
        ("RTX 6000 Ada", "6000 Ada", "sm89", 48),
    ],
)
def test_a_name(text: str, title: str, device: str, gib: int) -> None:
    found = find_fleet(text)
    assert (found.title, found.device, found.memory) == (title, device, gib << 30)
    assert found.model is not None


@pytest.mark.parametrize("name", GPUS)
def test_every_name_is_read_back(name: str) -> None:
    assert find_fleet(find_fleet(f"{name}x4").title).title == f"{name}x4"


def test_a_gpu_that_no_table_has() -> None:
    assert "the nearest is sm100" in find_fleet("5090").remark
    assert find_fleet("H100").remark == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("H10", "--gpu H10: not a known GPU. Did you mean 'H100'?"),
        ("sm90", "--gpu sm90: a plan needs the memory of the GPU; name it: H20, H100"),
        ("sm87", "--gpu sm87: a plan needs the memory of the GPU; name it"),
        ("H100x0", "--gpu H100x0: name one GPU or more"),
    ],
)
def test_a_wrong_name(text: str, sentence: str) -> None:
    with pytest.raises(QplugError) as error:
        find_fleet(text)
    assert str(error.value).startswith(sentence)


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, "sm90")
    other = Gpu("NVIDIA T1000", 4 << 30, "sm75")
    strange = Gpu("NVIDIA Thing", 10 << 30, "sm89")
    monkeypatch.setattr(fleet, "installed_gpus", lambda: [h100, h100, other])
    found = find_fleet("auto")
    assert (found.title, found.memory) == ("H100x2", 81559 << 20)
    assert found.remark == "1 other GPUs are not counted"
    monkeypatch.setattr(fleet, "installed_gpus", lambda: [strange])
    found = find_fleet("auto")
    assert (found.title, found.device, found.model) == ("NVIDIA Thing", "sm89", None)
    monkeypatch.setattr(fleet, "installed_gpus", list)
    found = find_fleet("auto")
    assert (found.title, found.is_cpu) == ("cpu", True)
    assert "no GPU" in found.remark
    assert find_fleet("cpu").remark == ""
