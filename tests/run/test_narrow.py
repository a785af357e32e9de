"""Linears that are too narrow for every kernel stay float, are printed, recorded and ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from odd_models import OddModel
from zoo.make import make

import qplug
from qplug import ModelView, QplugError, preset
from qplug.model.float_share import float_share
from qplug.registry.registry import Registry
from qplug.run.narrow import refuse_narrow

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


def refused(model: Path, out: Path, **words: Any) -> str:
    with pytest.raises(QplugError) as error:
        quantize(model, out, algo="rtn", dry_run=True, **words)
    return str(error.value)


def test_the_reason_with_most_weights_is_told(tmp_path: Path) -> None:
    """Not that of the first linears, which groups do not divide and which are 0.2% of the model."""
    model = make("axk2", tmp_path / "model")
    parts = [f"model.layers.*.self_attn.{part}" for part in ("kv_a_proj_with_mqa", "kv_b_proj")]
    parts += [f"model.layers.*.self_attn.{part}" for part in ("q_a_proj", "q_b_proj")]
    options = " ".join(f"--ignore '{part}'" for part in parts)
    assert refused(model, tmp_path / "out", group_size=128) == (
        "sglang: model.layers.0.self_attn.kv_a_proj_with_mqa: SGLang reads its weight itself, "
        f"which W4A16 packs; to keep such linears float, pass {options}"
    )
    plan = quantize(model, tmp_path / "out", group_size=128, ignore=parts, algo="rtn", dry_run=True)
    assert {name.rpartition(".")[2] for name in plan.kept_float} == {"W_down", "W_up"}


def test_a_matrix_is_refused_for_the_member_that_is_narrow(
    tmp_path: Path, write_llama: Callable[..., Path]
) -> None:
    model = write_llama(
        tmp_path / "model", num_attention_heads=8, num_key_value_heads=1, head_dim=16
    )
    parts = ("k_proj", "q_proj", "v_proj")
    options = " ".join(f"--ignore 'model.layers.*.self_attn.{part}'" for part in parts)
    message = refused(model, tmp_path / "out")
    assert message.startswith("sglang: model.layers.0.self_attn.k_proj: Marlin needs out_features")
    assert message.endswith(f"not 16; to keep such linears float, pass {options}")


THIN = "vllm: m.0.thin: is 3 wide"
ODD = "m.0.odd: is odd"
GROUPS = "m.0.half: groups of 128 do not divide its width, 64; choose another --group-size"
TO_KEEP = "to keep such linears float, pass"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"thin": 12, "odd": 2, "good": 86}, f"{THIN}; {TO_KEEP} --ignore 'm.*.thin'"),
        ({"thin": 2, "odd": 12, "good": 86}, f"vllm: {ODD}; {TO_KEEP} --ignore 'm.*.odd'"),
        (
            {"thin": 30, "odd": 20, "half": 2, "good": 50},
            f"{THIN} and {ODD}; {TO_KEEP} --ignore 'm.*.thin' --ignore 'm.*.odd'",
        ),
        ({"half": 60, "odd": 20, "good": 30}, GROUPS),
        (
            {"half": 60, "odd": 40, "good": 30},
            f"vllm: {ODD} and {GROUPS}; {TO_KEEP} --ignore 'm.*.odd'",
        ),
    ],
)
def test_as_many_reasons_are_told_as_decide(rows: dict[str, int], expected: str) -> None:
    """Of two blocks, whose sentences differ in a number, and of linears that are half as wide."""
    widths = {"half": 64}
    linears = {
        f"m.{block}.{name}": (count, widths.get(name, 128))
        for block in (0, 1)
        for name, count in rows.items()
    }
    view = ModelView({}, "bfloat16", linears, frozenset(linears), ("m.0", "m.1"), None)
    said = {"m.0.thin": "is 3 wide", "m.1.thin": "is 5 wide", "m.0.odd": "is odd"}
    said |= {"m.1.odd": "engines merge it with m.0.odd, which stays float"}
    said |= {f"m.{block}.half": "is half" for block in (0, 1)}
    narrow = {name: said[name] for name in linears if name in said}
    schemes = dict.fromkeys(linears, preset("W4A16"))
    exporter = Registry.installed().exporters.make("vllm", {})
    share = float_share(view, schemes.keys() - narrow.keys(), lambda name: False)
    with pytest.raises(QplugError) as error:
        refuse_narrow(view, schemes, narrow, exporter, share)
    assert str(error.value) == expected
