"""What engines build float stays float, is named in ignore, and is refused if it is quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from odd_models import OddModel
from zoo.make import make

import qplug
from qplug import QplugError
from qplug.checkpoint.open import open_checkpoint
from qplug.model.architectures import find_view
from qplug.model.kept_float import built_float
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]

#: Models, a part of the names of linears that an engine builds float, and that engine.
ROWS = [
    ("deepseek_v32", "indexer.weights_proj", "vllm"),
    ("deepseek_v32", "indexer.wk", "vllm"),
    ("deepseek_v32", "indexer.weights_proj", "sglang"),
    ("lfm2", "conv.in_proj", "vllm"),
    ("lfm2", "conv.out_proj", "vllm"),
    ("jamba", "mamba.in_proj", "vllm"),
    ("jamba", "mamba.x_proj", "vllm"),
    ("jamba", "mamba.dt_proj", "vllm"),
    ("jamba", "mamba.out_proj", "vllm"),
]


def quantize(model: Path, out: Path, **words: Any) -> qplug.Result:
    return qplug.quantize(str(model), out, **{"group_size": 32, "backend": "vllm", **words})


@pytest.mark.parametrize(("name", "part", "backend"), ROWS)
def test_it_stays_float_and_may_not_be_overridden(
    odd_model: OddModel, tmp_path: Path, name: str, part: str, backend: str
) -> None:
    model = odd_model(name)
    plan = quantize(model, tmp_path / "out", backend=backend, dry_run=True)
    assert any(kind.endswith(part) for kind in plan.floats)
    with pytest.raises(QplugError, match=rf"{part}: .* build it without quantization"):
        quantize(
            model, tmp_path / "out", backend=backend, overrides={f"*.{part}": "W8A16"}, dry_run=True
        )


def test_other_engines_may_quantize_it(odd_model: OddModel, tmp_path: Path) -> None:
    plan = quantize(odd_model("lfm2"), tmp_path / "out", backend="sglang", dry_run=True)
    assert not any("conv.in_proj" in kind for kind in plan.floats)


@pytest.mark.parametrize("name", ["deepseek_v32", "lfm2", "jamba"])
def test_the_folder_is_sound_until_it_is_quantized(
    odd_model: OddModel, tmp_path: Path, name: str
) -> None:
    result = quantize(odd_model(name), tmp_path / "out")
    verified = qplug.verify(str(tmp_path / "out"))
    assert verified.ok, verified.problems
    assert verified.float_share == pytest.approx(result.float_share)
    view = find_view(open_checkpoint(odd_model(name)), Registry.installed())
    floats = {n for n, why in view.built_float.items() if n in view.quantizable and why.engines}
    assert floats
    assert not floats & result.errors.keys()


def test_a_folder_that_quantizes_it_is_named(odd_model: OddModel, tmp_path: Path) -> None:
    """SGLang loads what vLLM does not."""
    out = tmp_path / "out"
    quantize(odd_model("lfm2"), out, backend="sglang")
    assert qplug.verify(str(out)).ok
    found = qplug.verify(str(out), backend="vllm").problems
    assert {(problem.check, problem.where) for problem in found} == {
        ("built", f"model.layers.0.conv.{local}") for local in ("in_proj", "out_proj")
    }


def test_a_router_under_another_name_stays_float(odd_model: OddModel) -> None:
    view = find_view(open_checkpoint(odd_model("hunyuan_v1_moe")), Registry.installed())
    assert "model.layers.0.mlp.gate.wg" in view.linears
    assert "model.layers.0.mlp.gate.wg" not in view.quantizable


def test_nothing_left_says_why(odd_model: OddModel, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match=r"nothing is left .*Mamba-1 layers take no quantization"):
        quantize(odd_model("mamba"), tmp_path / "out")


def test_inspect_says_why(odd_model: OddModel, cli: Cli) -> None:
    shown = cli("inspect", odd_model("deepseek_v32"))
    assert "stays float: model.layers.*.self_attn.indexer.weights_proj: vLLM" in shown.output
    plain = json.loads(cli("inspect", odd_model("gpt_oss"), "--json").output)
    assert "model.layers.*.mlp.router" in plain["stays float"]


@pytest.mark.parametrize(
    "name",
    [
        "mlp.gate",
        "mlp.gate.wg",
        "block_sparse_moe.router.layer",
        "feed_forward.router",
        "mlp.router.classifier",
        "mlp.shared_expert_gate",
        "self_attn.indexer.wk",
        "self_attn.indexer.weights_proj",
        "linear_attn.conv1d",
        "self_attn.q_conv1d",
        "attn_hc.fn",
        "mlp_hc.hc_fn",
        "attn_residual.input_mix_weight_up",
        "mlp_res_proj",
    ],
)
def test_names_that_engines_build_float_in_every_model(name: str) -> None:
    full = f"model.layers.0.{name}"
    assert full in built_float([full], {})


def test_linears_of_other_names_are_not_in_the_table() -> None:
    parts = ["mlp.gate_proj", "self_attn.wq_b", "linear_attn.in_proj_qkv", "mixer.in_proj"]
    assert not built_float([f"model.layers.0.{part}" for part in parts], {"model_type": "llama"})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt_bigcode", "transformer.h.0.attn.c_attn"),
        ("falcon_h1", "model.layers.0.mamba.in_proj"),
        ("afmoe", "model.layers.1.mlp.experts.0.up_proj"),
        ("olmo", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_what_sglang_alone_builds_float(model_type: str, name: str) -> None:
    found = built_float([name], {"model_type": model_type})
    assert found[name].engines == ("SGLang",)
    assert not built_float([name], {"model_type": "llama"})


def test_experts_that_vllm_reads_as_one_tensor_stay_float() -> None:
    name = "language_model.model.layers.0.mlp.experts.0.up_proj"
    shared = "language_model.model.layers.0.mlp.shared_experts.up_proj"
    found = built_float([name, shared], {"model_type": "aria"})
    assert found.keys() == {name}
    assert found[name].engines == ("vLLM",)
    assert not built_float([name], {"model_type": "llama"})


def test_a_projector_that_vllm_calls_otherwise(tmp_path: Path) -> None:
    """Its module in transformers has no name in common with its tensors: vLLM builds by that."""
    source = make("deepseek_ocr2", tmp_path / "model")
    qplug.quantize(
        str(source), tmp_path / "out", algo="rtn", scheme="W4A16", backend="vllm", device="cpu"
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    assert {"model.projector.layers", "model.multi_modal_projector"} <= {*ignore}
