"""Weights that qplug cannot quantize do not stay float in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from odd_models import OddModel

import qplug
from qplug import QplugError

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]

#: What to ignore in a model whose experts are stacked.
STACKED = {
    "gpt_oss": ("*.experts.gate_up_proj", "*.experts.down_proj"),
    "granitemoe": ("*.input_linear", "*.output_linear"),
}


@pytest.mark.parametrize("name", list(STACKED))
@pytest.mark.parametrize("backend", ["vllm", "sglang", "gptq", "fake", "compressed-tensors"])
def test_a_large_share_is_refused_before_a_weight_is_read(
    odd_model: OddModel, tmp_path: Path, name: str, backend: str
) -> None:
    with pytest.raises(QplugError, match=r"% of the weights in decoder .*--ignore 'model\.layers"):
        qplug.quantize(str(odd_model(name)), tmp_path / "out", group_size=32, backend=backend)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(STACKED))
@pytest.mark.parametrize("backend", ["vllm", "sglang", "gptq", "awq"])
def test_engines_find_ignored_experts_float(
    odd_model: OddModel, tmp_path: Path, name: str, backend: str
) -> None:
    out = tmp_path / "out"
    scheme = "W4A16_ASYM" if backend == "awq" else "W4A16"
    result = qplug.quantize(
        str(odd_model(name)),
        out,
        scheme=scheme,
        group_size=32,
        backend=backend,
        ignore=STACKED[name],
        samples=2,
    )
    assert result.float_share > 0.5
    verified = qplug.verify(str(out))
    assert verified.ok, verified.problems
    assert verified.float_share == pytest.approx(result.float_share)
    _forget_experts(out)
    checks = {problem.check for problem in qplug.verify(str(out)).problems}
    assert "experts" in checks


def _forget_experts(out: Path) -> None:
    """Removes the entries for experts from ``out``, as folders of earlier versions have none."""
    config = json.loads((out / "config.json").read_text())
    quantization: dict[str, Any] = config["quantization_config"]
    for key in ("ignore", "modules_to_not_convert", "dynamic"):
        if isinstance(entries := quantization.get(key), list):
            quantization[key] = [entry for entry in entries if "experts" not in entry]
        elif isinstance(entries, dict):
            quantization[key] = {k: v for k, v in entries.items() if "experts" not in k}
    (out / "config.json").write_text(json.dumps(config))


def test_the_share_is_printed(odd_model: OddModel, tmp_path: Path, cli: Cli) -> None:
    ignore = [word for pattern in STACKED["gpt_oss"] for word in ("--ignore", pattern)]
    words = ("quantize", odd_model("gpt_oss"), *ignore, "--group-size", 32, "--backend", "vllm")
    dry = cli(*words, "--out", tmp_path / "out", "--dry-run")
    assert "float: " in dry.output
    assert "mlp.experts.gate_up_proj" in dry.output
    done = cli(*words, "--out", tmp_path / "out")
    line = next(line for line in done.output.splitlines() if line.startswith("float: "))
    assert line in cli("verify", tmp_path / "out").output
    plain = json.loads(cli("verify", tmp_path / "out", "--json").output)
    assert 0.5 < plain["float_share"] < 1
    assert sum(plain["floats"].values()) == pytest.approx(plain["float_share"])
