"""NVFP4 and FP8 in one folder of ModelOpt, as SGLang 0.5.16 and 0.5.23 read it.

The oracle is written from ``ModelOptMixedPrecisionConfig._resolve_quant_algo`` in modelopt_quant.py
of 0.5.16, whose names are fewer than those of 0.5.23. It shares no code with qplug.
"""

from __future__ import annotations

import json
from shutil import copytree
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoilt import forget_checksums

import qplug
from qplug import ModelView, QplugError, Scheme, preset
from qplug.api.limits import Target
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.reading.folder import open_folder
from qplug.registry.registry import Registry
from qplug_sglang.engine import SGLang
from qplug_sglang.exporter import SGLangExporter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Quantized = Callable[..., Path]

NVFP4, FP8 = preset("NVFP4"), preset("FP8")
SGLANG, OLD_SGLANG = SGLangExporter(Target()), SGLangExporter(Target(engine="0.5.16"))
ATTENTION = {"*.self_attn.*": "FP8"}
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def algorithm(
    config: dict[str, Any], prefix: str, mapping: dict[str, list[str]] | None = None
) -> str | None:
    """What SGLang takes the module ``prefix`` for; ``mapping`` is ``packed_modules_mapping``."""
    layers = config["quantized_layers"]

    def candidates(name: str) -> list[str]:
        for old, new in (
            ("language_model.model.", "model.language_model."),
            ("model.language_model.", "language_model.model."),
        ):
            if name.startswith(old):
                return [name, new + name.removeprefix(old)]
        return [name]

    for name in candidates(prefix):
        if name in layers:
            return str(layers[name]["quant_algo"]).upper()
    parent, _, last = prefix.rpartition(".")
    members = (mapping or {}).get(last, ())
    found = {
        layers[f"{base}.{member}"]["quant_algo"].upper()
        for base in candidates(parent)
        for member in members
        if f"{base}.{member}" in layers
    }
    if found:
        (only,) = found  # SGLang raises a ValueError if members differ
        return str(only)
    for name in candidates(prefix):  # experts
        for key, entry in layers.items():
            if key.startswith(f"{name}."):
                return str(entry["quant_algo"]).upper()
    return None


def quantization(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return dict(config["quantization_config"])


def view(*names: str, block: str = "model.layers.0", **more: Any) -> ModelView:
    linears = {f"{block}.{name}" if name[0] != "/" else name[1:]: (128, 128) for name in names}
    return ModelView({}, "bfloat16", linears, frozenset(linears), (block,), None, **more)


def given(model: ModelView, *schemes: Scheme | None) -> dict[str, Scheme]:
    pairs = zip(model.linears, schemes, strict=True)
    return {name: scheme for name, scheme in pairs if scheme is not None}


@pytest.fixture(scope="module")
def mixed(quantized: Quantized) -> Path:
    return quantized("NVFP4", backend="sglang", overrides=ATTENTION)


# --- what is written ------------------------------------------------------------------------------


def test_the_fields_that_both_versions_ask_for(mixed: Path) -> None:
    config = quantization(mixed)
    assert config["quant_method"] == "modelopt"  # _parse_modelopt_quant_config
    assert config["quant_algo"] == "MIXED_PRECISION"
    # Without this key, get_quant_config looks for hf_quant_config.json, which does not exist.
    assert config["kv_cache_quant_algo"] is None
    assert config["ignore"] == config["exclude_modules"] == ["lm_head"]
    kinds = {json.dumps(entry) for entry in config["quantized_layers"].values()}
    assert kinds == {'{"quant_algo": "FP8"}', '{"quant_algo": "NVFP4", "group_size": 16}'}


@pytest.mark.parametrize("mapping", [None, MERGED])
def test_each_module_that_sglang_builds_is_found(
    mixed: Path, mapping: dict[str, list[str]] | None
) -> None:
    config = quantization(mixed)
    for block in range(4):
        for module, wanted in {
            "self_attn.qkv_proj": "FP8",
            "self_attn.o_proj": "FP8",
            "mlp.gate_up_proj": "NVFP4",
            "mlp.down_proj": "NVFP4",
        }.items():
            assert algorithm(config, f"model.layers.{block}.{module}", mapping) == wanted
    assert algorithm(config, "lm_head", mapping) is None


def test_codes_are_those_of_folders_with_one_scheme(mixed: Path, quantized: Quantized) -> None:
    folder = open_folder(str(mixed), Session.alone())
    fours = open_folder(str(quantized("NVFP4", backend="sglang")), Session.alone())
    eights = open_folder(str(quantized("FP8", backend="sglang")), Session.alone())
    assert {scheme.name for scheme in folder.schemes.values()} == {"NVFP4", "FP8"}
    for name, scheme in folder.schemes.items():
        alone = fours if scheme == NVFP4 else eights
        assert torch.equal(folder.dequantized(name), alone.dequantized(name))
    for local in ("weight_scale", "input_scale"):  # ModelOptFp8LinearMethod.create_weights
        found = folder.checkpoint.read(f"model.layers.0.self_attn.o_proj.{local}")
        assert (found.shape, found.dtype) == ((1,), torch.float32)


def test_experts_of_a_layer_have_one_entry_each() -> None:
    names = [f"mlp.experts.{n}.{p}_proj" for n in range(2) for p in ("gate", "up", "down")]
    model = view("self_attn.o_proj", *names)
    schemes = given(model, FP8, *[NVFP4] * 6)
    for exporter in (SGLANG, OLD_SGLANG):
        assert exporter.refuses(model, schemes) is None
    config = dict(SGLangExporter.format.config(model, schemes) or {})
    assert algorithm(config, "model.layers.0.mlp.experts") == "NVFP4"
    assert SGLangExporter.format.read_schemes(config, model) == schemes
    assert SGLangExporter.format.quantizes_experts(config, "model.layers.0.mlp.experts")
    assert not SGLangExporter.format.quantizes_experts(config, "model.layers.1.mlp.experts")


@pytest.mark.parametrize("root", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "language_model.model.", "language_model.", "model."]
)
def test_a_composite_model_is_found_wherever_sglang_puts_it(root: str, prefix: str) -> None:
    model = view("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", block=f"{root}layers.0")
    schemes = given(model, FP8, FP8, NVFP4)
    assert SGLANG.refuses(model, schemes) is None
    config = dict(SGLangExporter.format.config(model, schemes) or {})
    assert algorithm(config, f"{prefix}layers.0.self_attn.qkv_proj") == "FP8"
    assert algorithm(config, f"{prefix}layers.0.mlp.gate_up_proj") == "NVFP4"
    assert SGLangExporter.format.read_schemes(config, model) == schemes


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["W4A16", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16"])
def test_another_scheme_beside_nvfp4(other: str) -> None:
    model = view("up", "down")
    for exporter in (SGLANG, OLD_SGLANG) if other != "NVFP4A16" else (SGLANG,):
        assert exporter.refuses(model, given(model, NVFP4, preset(other))) == (
            f"NVFP4 is stored in ModelOpt's format, which has FP8 beside it, not {other}; take "
            "--backend compressed-tensors for both in one folder"
        )


def test_merged_linears_share_a_scheme() -> None:
    model = view("self_attn.q_proj", "self_attn.k_proj")
    sentence = str(SGLANG.refuses(model, given(model, NVFP4, FP8)))
    assert sentence.endswith("into one matrix, so they must share one scheme")


@pytest.mark.parametrize("shared", ["shared_expert", "shared_experts"])
@pytest.mark.parametrize("scheme", [FP8, None])
def test_a_shared_expert_has_the_scheme_of_the_others(shared: str, scheme: Scheme | None) -> None:
    names = ("attn.o_proj", "mlp.experts.0.up_proj", f"mlp.{shared}.up_proj")
    model = view(*names)
    kind = "FP8" if scheme else "float"
    assert SGLANG.refuses(model, given(model, FP8, NVFP4, scheme)) == (
        f"model.layers.0.mlp.{shared}.up_proj: is {kind}, and the experts that SGLang may fuse it "
        "with are NVFP4: give both one scheme"
    )
    assert SGLANG.refuses(model, given(model, FP8, NVFP4, NVFP4)) is None
    assert SGLANG.refuses(model, given(model, NVFP4, NVFP4, None)) is None  # nothing is mixed


def test_names_that_sglang_may_not_find() -> None:
    model = view("mlp.up_proj", "mlp.down_proj", block="model.text.layers.0")
    assert SGLANG.refuses(model, given(model, NVFP4, NVFP4)) is None
    sentence = str(SGLANG.refuses(model, given(model, NVFP4, FP8)))
    assert sentence.startswith("model.text.layers.0.mlp.up_proj: SGLang may have another name")
    model = view("mlp.up_proj", "/mtp.layers.0.mlp.up_proj")
    sentence = str(SGLANG.refuses(model, given(model, NVFP4, FP8)))
    assert sentence.endswith("add --ignore mtp.layers.0.mlp.up_proj")


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, "0.5.16"])
def test_a_mixed_folder_is_sound(mixed: Path, version: str | None) -> None:
    verdict = qplug.verify(str(mixed), backend="sglang", engine_version=version)
    assert verdict.problems == ()


def test_scales_of_a_cache(quantized: Quantized) -> None:
    out = quantized("NVFP4", backend="sglang", overrides=ATTENTION, kv_cache="fp8")
    assert quantization(out)["kv_cache_quant_algo"] == "FP8"
    assert qplug.verify(str(out)).problems == ()


def test_the_reader_reads_it_as_a_float_model(mixed: Path) -> None:
    source = open_checkpoint(mixed, readers=Registry.installed().sources)
    folder = open_folder(str(mixed), Session.alone())
    assert source.quantized == "modelopt MIXED_PRECISION"
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        found = source.read(f"{name}.weight")
        assert torch.equal(found, folder.dequantized(name).to(found.dtype))


def _broken(mixed: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> list[str]:
    copytree(mixed, out)
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    forget_checksums(out)
    return sorted({f"{p.check} {p.where}" for p in qplug.verify(str(out)).problems})


def test_a_merged_matrix_without_an_entry(mixed: Path, tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.qkv_proj"

    def forget(config: dict[str, Any]) -> None:
        del config["quantization_config"]["quantized_layers"][name]

    assert _broken(mixed, tmp_path / "llama", forget) == [f"merged {name}"]
    config = quantization(tmp_path / "llama")
    assert algorithm(config, name) is None
    assert algorithm(config, name, MERGED) == "FP8"  # where SGLang's class knows the members

    def forget_in_deci(config: dict[str, Any]) -> None:
        forget(config)
        config["architectures"] = ["DeciLMForCausalLM"]

    assert _broken(mixed, tmp_path / "deci", forget_in_deci) == []


def test_a_mixture_without_nvfp4_would_be_another_method(quantized: Quantized) -> None:
    model = view("up")
    config = dict(SGLangExporter.format.config(model, given(model, NVFP4)) or {})
    config |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"up": {"quant_algo": "FP8"}}}
    folder = open_checkpoint(quantized("FP8", backend="sglang"))
    folder.config["quantization_config"] = config
    found = SGLang().check_folder(folder, model, SGLangExporter.format)
    assert "quantized_layers" in {problem.where for problem in found}


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("mlp.up_proj.weight_scale_2", lambda t: t.mul_(2), "fused"),
        ("mlp.down_proj.weight_scale_2", lambda t: t.zero_(), "scale"),
        ("self_attn.o_proj.weight_scale", lambda t: t.zero_(), "scale"),
        ("self_attn.o_proj.input_scale", lambda t: t.fill_(torch.inf), "scale"),
    ],
)
def test_scales_are_sound(
    mixed: Path, tmp_path: Path, name: str, change: Callable[[Tensor], Any], check: str
) -> None:
    out = copytree(mixed, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    change(tensors[f"model.layers.1.{name}"])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    forget_checksums(out)
    assert {problem.check for problem in qplug.verify(str(out)).problems} == {check}


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ({}, "MIXED_PRECISION has no quantized_layers"),
        ({"up": {"quant_algo": "W4A16_AWQ"}}, "not up with quant_algo 'W4A16_AWQ'"),
        ({"up": {"quant_algo": "FP8_PB_WO", "group_size": 64}}, "'FP8_PB_WO' in groups of 64"),
        ({"up": {"quant_algo": "NVFP4", "group_size": 32}}, "quant_algo 'NVFP4' in groups of 32"),
        ({"up": "FP8"}, "not up with quant_algo None"),
    ],
)
def test_what_qplug_does_not_read(layers: dict[str, Any], sentence: str) -> None:
    config = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
    }
    with pytest.raises(QplugError, match=sentence):
        SGLangExporter.format.read_schemes(config, view("up"))


def test_an_old_sglang_is_told_which_kernel_has_nvfp4() -> None:
    told = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}}
    assert SGLang().serve_arguments(told) == ()
    assert SGLang().at("0.5.16").serve_arguments(told) == ("--fp4-gemm-backend", "marlin")
