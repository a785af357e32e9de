"""``--backend-opt gpu=``: names of GPUs, and numbers of compute capabilities, mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qplug
from qplug import QplugError, Target
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]


@pytest.mark.parametrize("backend", ["vllm", "sglang", "gptq", "awq"])
def test_a_name(backend: str) -> None:
    exporters = Registry.installed().only("exporter").exporters
    target = exporters.make(backend, {"gpu": "RTX 4090"}).target
    assert (target.gpu, target.column.device, target.column.remark) == ("RTX 4090", "sm89", "")
    assert exporters.make(backend, {"gpu": "sm89"}).target.column == target.column
    assert exporters.make(backend).target.column.device == "any"
    with pytest.raises(QplugError) as error:
        exporters.make(backend, {"gpu": "H10"})
    assert str(error.value).startswith(
        f"backend {backend}: H10: not a known GPU. Did you mean 'H100'?"
    )


def test_the_table_of_the_gpu_decides(cli: Cli, tmp_path: Path) -> None:
    words = ("quantize", "qplug:demo", "--scheme", "W8A8", "--backend", "vllm", "--dry-run")
    out = ("--out", tmp_path / "out", "--backend-opt")
    for gpu in ("H100", "sm90", "3090"):
        assert cli(*words, *out, f"gpu={gpu}").exit_code == 0
    for gpu in ("B200", "sm100", "5090"):
        result = cli(*words, *out, f"gpu={gpu}")
        assert result.exit_code == 1
        assert "Cutlass has no int8 for sm100: use FP8_DYNAMIC" in result.stderr


def test_a_run_says_that_a_column_only_comes_near(tmp_path: Path) -> None:
    def notes(gpu: str) -> tuple[str, ...]:
        words = {"backend": "vllm", "backend_options": {"gpu": gpu}}
        return qplug.quantize("qplug:demo", tmp_path / gpu, dry_run=True, **words).notes

    assert notes("H100") == ()
    assert notes("3090") == (
        "3090 is sm86; no table has it, the nearest is sm80, which may differ",
    )


def test_a_target_checks_its_gpu() -> None:
    with pytest.raises(QplugError, match="nothing: not a known GPU"):
        Target(gpu="nothing")
    assert Target(gpu="H200") == Target(gpu="H200")
