"""Weights that qplug cannot quantize do not stay float in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from odd_models import OddModel

import qplug
from qplug import ModelView
from qplug.model.float_share import float_share

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]

#: What to ignore in a model whose experts are stacked on disk.
STACKED = {"gpt_oss": ("*.experts.*",), "granitemoe": ("*.experts.*",)}


def test_a_large_share_that_nobody_named_is_refused() -> None:
    blocks = ("model.layers.0", "model.layers.1")
    linears = {f"{block}.self_attn.q_proj": (64, 64) for block in blocks}
    experts = {f"{block}.mlp.experts.gate_up_proj": (4, 64, 64) for block in blocks}
    view = ModelView(
        {}, "bfloat16", linears, frozenset(linears), blocks, None, other_weights=experts
    )
    share = float_share(view, linears, lambda name: False)
    assert share.silent == share.total == pytest.approx(0.8)
    sentence = share.refusal()
    assert sentence is not None
    assert sentence.startswith("80% of the weights in decoder blocks would stay float")
    assert "--ignore 'model.layers.*.mlp.experts.gate_up_proj'" in sentence
    assert float_share(view, linears, lambda name: ".experts." in name).refusal() is None


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
    words = (
        "quantize",
        "--algo",
        "rtn",
        odd_model("gpt_oss"),
        *ignore,
        "--group-size",
        32,
        "--backend",
        "vllm",
    )
    dry = cli(*words, "--out", tmp_path / "out", "--dry-run")
    assert "float: " in dry.output
    assert "mlp.experts.*.gate_proj" in dry.output
    done = cli(*words, "--out", tmp_path / "out")
    line = next(line for line in done.output.splitlines() if line.startswith("float: "))
    # The folder has its experts stacked, as they were: the kinds have other names there.
    share = line.partition(" of the weights")[0]
    assert share in cli("verify", tmp_path / "out").output
    plain = json.loads(cli("verify", tmp_path / "out", "--json").output)
    assert 0.5 < plain["float_share"] < 1
    assert sum(plain["floats"].values()) == pytest.approx(plain["float_share"])
