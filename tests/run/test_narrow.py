"""Linears that are too narrow for every kernel stay float, are printed, recorded and ignored."""

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

KIND = "model.layers.*.linear_attn.in_proj_a"
NARROW = {f"model.layers.0.linear_attn.in_proj_{part}" for part in "ab"}


def quantize(model: Path, out: Path, **words: Any) -> qplug.Result:
    return qplug.quantize(str(model), out, **{"group_size": 32, "backend": "sglang", **words})


@pytest.mark.parametrize(
    ("backend", "scheme"),
    [("sglang", "W4A16"), ("vllm", "W4A16"), ("gptq", "W8A16"), ("awq", "W4A16_ASYM")],
)
def test_they_stay_float_and_verify_accepts_the_folder(
    odd_model: OddModel, tmp_path: Path, backend: str, scheme: str
) -> None:
    out = tmp_path / "out"
    result = quantize(odd_model("qwen3_5_text"), out, backend=backend, scheme=scheme, samples=2)
    assert set(result.kept_float) == NARROW
    assert "in multiples of" in result.kept_float[min(NARROW)]
    assert not NARROW & result.errors.keys()
    assert qplug.verify(str(out)).ok
    record = json.loads((out / "qplug.json").read_text())
    assert record["kept_float"] == result.kept_float


def test_they_are_printed_once_for_each_kind(odd_model: OddModel, tmp_path: Path, cli: Cli) -> None:
    words = (
        "quantize",
        "--algo",
        "rtn",
        odd_model("qwen3_5_text"),
        "--group-size",
        32,
        "--out",
        tmp_path / "out",
    )
    for options in (("--dry-run",), ()):
        lines = cli(*words, *options).output.splitlines()
        kept = [line for line in lines if line.startswith("kept float: ")]
        assert len(kept) == 2
        assert (
            f"kept float: {KIND} (1 linear): Marlin needs out_features in multiples of 64"
            in (kept[0])
        )
    assert f"stays float: {KIND}: Marlin needs" in cli("inspect", tmp_path / "out").output


def test_one_that_an_override_names_is_refused(odd_model: OddModel, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match=r"in_proj_a: Marlin needs out_features in multiples"):
        quantize(
            odd_model("qwen3_5_text"),
            tmp_path / "out",
            overrides={"*.in_proj_a": "W4A16", "*.in_proj_b": "W4A16"},
            dry_run=True,
        )


def test_a_scheme_that_is_not_served_is_refused(odd_model: OddModel, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match=r"NVFP4"):
        quantize(odd_model("qwen3_5_text"), tmp_path / "out", scheme="NVFP4A16", dry_run=True)


def test_all_members_of_a_merged_matrix_stay_float(
    tmp_path: Path, write_llama: Callable[..., Path]
) -> None:
    model = write_llama(
        tmp_path / "model",
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=16,
    )
    plan = quantize(model, tmp_path / "out", dry_run=True)
    kinds = {name.rpartition(".")[2] for name in plan.kept_float}
    assert kinds == {"q_proj", "k_proj", "v_proj"}
    assert plan.kept_float["model.layers.0.self_attn.q_proj"] == (
        "engines merge it with model.layers.0.self_attn.k_proj, which stays float"
    )


def test_groups_that_do_not_divide_most_linears_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="choose another --group-size"):
        quantize(Path("qplug:demo"), tmp_path / "out", group_size=96)
