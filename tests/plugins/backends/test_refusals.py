"""What a backend cannot serve is refused in a sentence, before any weight is read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import qplug
from qplug import PRESETS, Exporter, ModelView, NoParams, QplugError, QuantArgs, Scheme, preset
from qplug.api.gpus import DEVICES
from qplug.api.limits import Target, shard_shape
from qplug.api.scheme import CACHES
from qplug_compressed_tensors.exporter import CompressedTensorsExporter
from qplug_compressed_tensors.fusing import fused_groups
from qplug_sglang.exporter import SGLangExporter
from qplug_vllm.exporter import VLLMExporter

if TYPE_CHECKING:
    from pathlib import Path

CT, VLLM = CompressedTensorsExporter(NoParams()), VLLMExporter(Target())
SGLANG, OLD_SGLANG = SGLangExporter(Target()), SGLangExporter(Target(engine="0.5.16"))
W4, W8 = preset("W4A16"), preset("W8A16")


def view(**linears: tuple[int, int]) -> ModelView:
    """A model of one block, with linears of these shapes (out, in)."""
    named = {f"layers.0.{name}": shape for name, shape in linears.items()}
    return ModelView({}, "bfloat16", named, frozenset(named), ("layers.0",), None)


def refusal(exporter: Exporter[Any], model: ModelView, *schemes: Scheme | None) -> str | None:
    """What is said to ``schemes``, one for each linear; None leaves a linear float."""
    assert len(schemes) == len(model.linears)
    pairs = zip(model.linears, schemes, strict=True)
    return exporter.refuses(model, {name: scheme for name, scheme in pairs if scheme is not None})


@pytest.mark.parametrize(
    ("exporter", "scheme", "shape", "side"),
    [
        (SGLANG, "W4A16", (96, 256), "out_features in multiples of 64, not 96"),
        (SGLANG, "W4A16", (128, 192), "in_features in multiples of 128, not 192"),
        (SGLANG, "W4A16_ASYM", (96, 256), "out_features in multiples of 64, not 96"),
        (SGLANG, "W8A16", (128, 192), "in_features in multiples of 128, not 192"),
        (SGLANG, "W8A8", (20, 64), "out_features in multiples of 8, not 20"),
        (SGLANG, "W8A8", (64, 24), "in_features in multiples of 16, not 24"),
        (SGLANG, "FP8_DYNAMIC", (24, 64), "out_features in multiples of 16, not 24"),
        (SGLANG, "FP8_BLOCK", (192, 256), "out_features in multiples of 128, not 192"),
        (VLLM, "W4A16", (48, 128), "out_features in multiples of 32, not 48"),
        (VLLM, "W8A16", (64, 48), "in_features in multiples of 32, not 48"),
        (SGLANG, "FP8", (64, 24), "in_features in multiples of 16, not 24"),
        (VLLM, "W8A8", (24, 64), "out_features in multiples of 16, not 24"),
        (VLLM, "W8A8_STATIC", (24, 64), "out_features in multiples of 16, not 24"),
        (VLLM, "FP8", (64, 24), "in_features in multiples of 16, not 24"),
        (VLLM, "FP8_DYNAMIC", (64, 24), "in_features in multiples of 16, not 24"),
        (VLLM, "FP8_BLOCK", (128, 200), "in_features in multiples of 128, not 200"),
    ],
)
def test_shapes_that_no_kernel_takes(
    exporter: Exporter[Any], scheme: str, shape: tuple[int, int], side: str
) -> None:
    found = preset(scheme)
    if found.weights.strategy == "group":
        found = found.with_group_size(-1)
    sentence = refusal(exporter, view(up=(128, 128), odd=shape), found, found)
    assert sentence is not None
    assert sentence.startswith("layers.0.odd: ")
    assert sentence.endswith(side)
    assert refusal(CT, view(odd=shape), found) is None  # the format itself has no such limits


@pytest.mark.parametrize("scheme", PRESETS)
def test_the_multiples_are_enough(exporter: Exporter[Any], scheme: str) -> None:
    assert exporter.engine is not None
    rows = [row for row in exporter.engine.capabilities() if row.scheme == scheme]
    if not rows:
        assert exporter.name == "compressed-tensors"
        return
    served = [row for row in rows if row.served]
    if not served:
        sentence = refusal(exporter, view(up=(128, 128)), preset(scheme))
        assert sentence == f"layers.0.up: {rows[0].kernel}"
    for row in served:
        for size in row.group_sizes or (None,):
            found = preset(scheme) if size is None else preset(scheme).with_group_size(size)
            shape = (row.out_multiple, max(row.in_multiple, size or 1))
            name = "mlp.experts.0.up_proj" if "experts alone" in row.kernel else "up"
            assert refusal(exporter, view(**{name: shape}), found) is None


@pytest.mark.parametrize("exporter", [VLLM, SGLANG], ids=lambda exporter: exporter.name)
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16"])
@pytest.mark.parametrize("size", [16, 256])
def test_groups_that_no_kernel_takes(exporter: Exporter[Any], scheme: str, size: int) -> None:
    sentence = refusal(exporter, view(up=(256, 256)), preset(scheme).with_group_size(size))
    assert sentence is not None
    assert f"takes groups of 32, 64, 128, -1, not {size}" in sentence
    assert refusal(CT, view(up=(256, 256)), preset(scheme).with_group_size(size)) is None


@pytest.mark.parametrize("exporter", [VLLM, SGLANG], ids=lambda exporter: exporter.name)
def test_every_device_has_just_one_row(exporter: Exporter[Any]) -> None:
    assert exporter.engine is not None
    rows = exporter.engine.capabilities()
    cells = [(row.scheme, device) for row in rows for device in row.devices]
    assert len(set(cells)) == len(cells)
    for row in rows:
        assert row.devices
        assert set(row.devices) <= set(DEVICES)
        assert row.evidence.startswith(("run on ", "not run; "))
    assert {scheme for scheme, *_ in cells} == set(PRESETS)


def test_a_device_has_limits_of_its_own() -> None:
    model = view(up=(128, 128))
    for gpu, sentence in (
        ("sm80", "layers.0.up: the int4 and fp8 kernel of Cutlass is for sm90 alone"),
        ("sm90", None),
        ("any", None),
    ):
        found = refusal(VLLMExporter(Target(gpu=gpu)), model, preset("W4AFP8"))  # type: ignore[arg-type]
        assert found == sentence
    old = SGLangExporter(Target(gpu="sm80", engine="0.5.16"))
    found = refusal(old, model, preset("NVFP4"))
    assert found == "layers.0.up: no kernel for NVFP4 is known on sm80"
    assert refusal(SGLangExporter(Target(gpu="sm80")), model, preset("NVFP4")) is None


@pytest.mark.parametrize(
    ("name", "shape", "tp", "part"),
    [
        ("q_proj", (256, 512), 4, (64, 512)),
        ("k_proj", (128, 512), 4, (64, 512)),  # two heads, and four processes
        ("o_proj", (512, 256), 4, (512, 64)),
        ("down_proj", (512, 1024), 2, (512, 512)),
        ("experts.3.w2", (512, 1024), 2, (512, 512)),
        ("gate", (8, 512), 2, (8, 512)),
        ("kv_a_proj_with_mqa", (96, 512), 2, (96, 512)),
        ("up_proj", (96, 512), 1, (96, 512)),
        ("up_proj", (90, 512), 4, "out_features, 90, cannot be split in 4"),
        ("down_proj", (512, 90), 4, "in_features, 90, cannot be split in 4"),
    ],
)
def test_parts_of_weights(
    name: str, shape: tuple[int, int], tp: int, part: tuple[int, int] | str
) -> None:
    config = {"num_attention_heads": 8, "num_key_value_heads": 2}
    assert shard_shape(f"layers.0.{name}", shape, config, tp) == part


def test_groups_have_to_divide_the_part_of_a_row() -> None:
    model = view(down_proj=(512, 1152))
    assert refusal(VLLM, model, W4) is None
    sentence = refusal(VLLMExporter(Target(tp=2)), model, W4)
    assert sentence == (
        "layers.0.down_proj: groups of 128 do not divide in_features, 576 in each of 2 processes"
    )
    assert refusal(VLLMExporter(Target(tp=2)), model, W4.with_group_size(64)) is None


def test_parts_are_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="multiples of 128, not 64 in each of 2 processes"):
        qplug.quantize(
            "qplug:demo",
            tmp_path / "out",
            scheme="FP8_BLOCK",
            backend="vllm",
            backend_options={"tp": 2, "gpu": "sm90"},
        )
    assert not list(tmp_path.iterdir())


def test_who_takes_a_head() -> None:
    linears = {"layers.0.up": (128, 128), "lm_head": (256, 128)}
    model = ModelView({}, "bfloat16", linears, frozenset(["layers.0.up"]), ("layers.0",), "lm_head")
    schemes = {"layers.0.up": W4, "lm_head": W8}
    assert VLLM.refuses(model, schemes) is None
    assert SGLANG.refuses(model, schemes) is None
    assert OLD_SGLANG.refuses(model, schemes) == (
        "lm_head: SGLang 0.5.16 does not load a head in W8A16; add --ignore lm_head"
    )
    fp4 = {"layers.0.up": W4, "lm_head": preset("NVFP4A16")}
    assert VLLM.refuses(model, fp4) == (
        "lm_head: vLLM 0.33.0 does not load a head in NVFP4A16; add --ignore lm_head"
    )
    router = replace(model, head=None)
    assert VLLM.refuses(router, schemes) == (
        "lm_head: vLLM 0.33.0 keeps routers float; add --ignore lm_head"
    )


def test_two_formats_are_refused_by_an_old_sglang_alone() -> None:
    model = view(up=(128, 128), down=(128, 128))
    schemes = (W4, preset("W8A8"))
    assert refusal(OLD_SGLANG, model, *schemes) == (
        "SGLang 0.5.16 reads one format in a folder, not int-quantized and pack-quantized"
    )
    for exporter in (SGLANG, VLLM, CT):
        assert refusal(exporter, model, *schemes) is None


def test_experts_of_sglang_want_one_format_in_the_folder() -> None:
    """Its experts compare the format of the folder, which is mixed-precision if there are two."""
    linears = {"mlp.experts.0.up_proj": (128, 128), "attn.o_proj": (128, 128)}
    mixed = (W4, preset("W8A8"))
    assert refusal(SGLANG, view(**linears), *mixed) == (
        "layers.0.mlp.experts.0.up_proj: SGLang 0.5.23 runs experts in W4A16 only in a folder of "
        "one format, not beside int-quantized"
    )
    assert refusal(VLLM, view(**linears), *mixed) is None
    assert refusal(SGLANG, view(**linears), preset("FP8_DYNAMIC"), W4) is None
    assert refusal(SGLANG, view(**linears), W4, W8) is None


def test_nvfp4_of_sglang_has_fp8_alone_beside_it() -> None:
    model = view(up=(128, 128), down=(128, 128))
    sentence = str(refusal(SGLANG, model, preset("NVFP4"), W4))
    assert sentence.startswith("NVFP4 is stored in ModelOpt's format, which has FP8 beside it, ")
    assert refusal(SGLANG, model, preset("NVFP4"), preset("FP8")) is None
    assert refusal(SGLANG, model, preset("NVFP4A16"), W4) is None


def test_scales_of_a_cache_are_refused_where_they_would_be_dropped(tmp_path: Path) -> None:
    cache, model = CACHES["fp8"], view(up=(128, 128))
    llama, qwen = (
        replace(model, config={"architectures": [f"{name}ForCausalLM"]})
        for name in ("Llama", "Qwen2")
    )
    for exporter in (VLLM, CT):
        assert exporter.refuses_cache(cache, qwen) is None
    assert SGLANG.refuses_cache(cache, llama) is None
    assert SGLANG.refuses_cache(cache, qwen) == (
        "SGLang 0.5.23 drops the scales of Qwen2ForCausalLM in silence; leave the option out"
    )
    assert "--kv-cache-dtype fp8_e4m3" in str(OLD_SGLANG.refuses_cache(cache, llama))
    old: dict[str, Any] = {"backend": "sglang", "backend_options": {"engine": "0.5.16"}}
    with pytest.raises(QplugError, match=r"--kv-cache: sglang: SGLang 0\.5\.16 drops the scales"):
        qplug.quantize("qplug:demo", tmp_path / "out", kv_cache="fp8", **old)
    assert not list(tmp_path.iterdir())


def test_two_widths_in_one_format_are_served(exporter: Exporter[Any]) -> None:
    assert refusal(exporter, view(up=(128, 128), down=(128, 128)), W4, W8) is None


@pytest.mark.parametrize(
    ("linears", "schemes"),
    [
        (("q_proj", "k_proj", "v_proj"), (W4, W8, W4)),
        (("q_proj", "k_proj", "v_proj"), (W4, W4, None)),
        (("q_proj", "k_proj", "v_proj"), (W4, W4, W4.with_group_size(64))),
        (("gate_proj", "up_proj"), (None, W4)),
        (("w1", "w3"), (W4, W8)),
        (("experts.0.up_proj", "experts.1.up_proj"), (W4, W8)),
        (("experts.0.down_proj", "experts.1.down_proj"), (W4, None)),
        (("experts.0.up_proj", "experts.0.down_proj"), (W4, W8)),
    ],
)
def test_linears_that_are_merged_share_a_scheme(
    exporter: Exporter[Any], linears: tuple[str, ...], schemes: tuple[Scheme | None, ...]
) -> None:
    model = view(**dict.fromkeys(linears, (128, 128)))
    sentence = refusal(exporter, model, *schemes)
    assert sentence is not None
    assert sentence.endswith("into one matrix, so they must share one scheme")
    assert "layers.0." + linears[0] in sentence
    assert refusal(exporter, model, *[W4 for _ in linears]) is None


def test_merging_is_within_a_layer() -> None:
    names = [f"layers.{n}.attn.{part}" for n in range(2) for part in ("q_proj", "k_proj", "o_proj")]
    groups = fused_groups([*names, "layers.0.mlp.gate", "layers.0.mlp.up_proj"])
    assert groups == [
        ["layers.0.attn.q_proj", "layers.0.attn.k_proj"],
        ["layers.1.attn.q_proj", "layers.1.attn.k_proj"],
    ]


TOKEN_INT8 = QuantArgs("int8", "token", dynamic=True)
TOKEN_INT4 = QuantArgs("int4", "token", dynamic=True)
TOKEN_FP8 = QuantArgs("e4m3", "token", dynamic=True)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("W3A16_TENSOR", QuantArgs("int3", "tensor")),
        Scheme("W4A16_TENSOR", QuantArgs("int4", "tensor")),
        Scheme("W8A16_TENSOR", QuantArgs("int8", "tensor", symmetric=False)),
        Scheme("W4A4", QuantArgs("int4", "group", 128), TOKEN_INT4),
        Scheme("W8A8_GROUP", QuantArgs("int8", "group", 128), TOKEN_INT8),
        Scheme("W8A8_ASYM", QuantArgs("int8", "channel", symmetric=False), TOKEN_INT8),
        Scheme("INT8_FP8", QuantArgs("int8", "channel"), TOKEN_FP8),
        Scheme("FP8_INT8", QuantArgs("e4m3", "channel"), TOKEN_INT8),
        Scheme("WE4M3A16", QuantArgs("e4m3", "group", 128)),
        Scheme("E5M2", QuantArgs("e5m2", "channel"), QuantArgs("e5m2", "token", dynamic=True)),
    ],
    ids=lambda scheme: scheme.name,
)
def test_schemes_without_a_layout(exporter: Exporter[Any], scheme: Scheme) -> None:
    sentence = refusal(exporter, view(up=(128, 128)), scheme)
    assert sentence == f"the format has no layout for {scheme.name} ({scheme.weights.dtype})"


def test_schemes_without_a_kernel() -> None:
    scheme = Scheme("W3A8", QuantArgs("int3", "group", 128), TOKEN_INT8)
    for exporter in (VLLM, SGLANG):
        sentence = refusal(exporter, view(up=(128, 128)), scheme)
        assert sentence == "layers.0.up: no kernel for W3A8 is known"
    assert refusal(CT, view(up=(128, 128)), scheme) is None


# --- as the user meets them ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {
                "backend": "sglang",
                "overrides": {"*.mlp.*": "W8A8"},
                "backend_options": {"engine": "0.5.16"},
            },
            "SGLang 0.5.16 reads one format",
        ),
        (
            {
                "backend": "sglang",
                "scheme": "NVFP4A16",
                "backend_options": {"engine": "0.5.16", "gpu": "B200"},
            },
            "fp4 kernels of sm100 take inputs in fp4: use NVFP4",
        ),
        (
            {"backend": "sglang", "backend_options": {"engine": "0.5.17"}},
            "no table for version '0.5.17' of the engine; there are: SGLang 0.5.23, SGLang 0.5.16",
        ),
        ({"backend": "vllm", "overrides": {"*.q_proj": "W8A16"}}, "vllm: engines fuse "),
        ({"backend": "vllm", "ignore": ["*.gate_proj"]}, "vllm: engines fuse "),
        ({"backend": "sglang", "group_size": 16}, "Marlin takes groups of 32, 64, 128, -1"),
        ({"backend": "sglang", "group_size": 96}, "groups of 96 do not divide its width, 256"),
    ],
)
def test_a_run_is_refused_and_leaves_nothing(
    tmp_path: Path, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(QplugError) as refused:
        qplug.quantize("qplug:demo", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert sentence in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_narrow_model_is_refused_by_engines_and_written_for_the_format(
    narrow_llama: Path, tmp_path: Path
) -> None:
    for backend in ("vllm", "sglang"):
        with pytest.raises(QplugError, match=r"needs (in|out)_features in multiples of"):
            qplug.quantize(str(narrow_llama), tmp_path / "out", backend=backend, group_size=-1)
    found = qplug.quantize(
        str(narrow_llama), tmp_path / "out", backend="compressed-tensors", group_size=-1
    )
    assert len(found.errors) == 14


@pytest.mark.parametrize("heads", [float("nan"), "two", -1])
def test_heads_that_are_no_number_divide_nothing(heads: object) -> None:
    config = {"num_key_value_heads": heads}
    assert shard_shape("model.layers.0.self_attn.k_proj", (64, 32), config, 2) == (32, 32)


def test_experts_that_vllm_cannot_load() -> None:
    experts = {f"mlp.experts.{n}.{part}": (128, 128) for n in (0, 1) for part in ("w1", "w2", "w3")}
    model = view(**experts)

    def said(scheme: Scheme) -> str | None:
        return refusal(VLLM, model, *[scheme] * len(experts))

    first = "layers.0.mlp.experts.0.w1: vLLM runs"
    assert said(preset("W4A8")) == f"{first} no experts in W4A8; try W4A16 or W8A8"
    rows = preset("W3A16").with_group_size(-1)
    assert said(rows) == f"{first} experts in W3A16 in groups alone: add --group-size 64"
    for scheme in (preset("W3A16").with_group_size(64), preset("MXFP8"), preset("MXFP4AFP8")):
        assert said(scheme) is None
    assert refusal(VLLM, view(up=(128, 128)), preset("W4A8")) is None


@pytest.mark.parametrize("name", ["FP8A16", "FP8A16_TENSOR", "FP8A16_BLOCK"])
@pytest.mark.parametrize(
    ("exporter", "release"),
    [
        *((VLLMExporter, f"vLLM {at}") for at in ("0.26.0", "0.32.0", "0.33.0")),
        *((SGLangExporter, f"SGLang {at}") for at in ("0.5.16", "0.5.23")),
    ],
)
def test_no_engine_has_experts_in_fp8_with_float_inputs(
    exporter: type[Exporter[Target]], release: str, name: str
) -> None:
    served = exporter(Target(engine=release.partition(" ")[2]))
    expert, dense = view(**{"mlp.experts.0.up_proj": (128, 128)}), view(up=(128, 128))
    said = refusal(served, expert, preset(name))
    first = f"layers.0.mlp.experts.0.up_proj: {release} runs no experts in {name}"
    assert said == f"{first}; try FP8_DYNAMIC or W4A16"
    unserved = {"FP8A16_BLOCK", *(["FP8A16"] if release == "SGLang 0.5.16" else [])}
    assert (refusal(served, dense, preset(name)) is None) == (name not in unserved)


def test_fp8_with_float_inputs_has_no_groups() -> None:
    with pytest.raises(QplugError, match="FP8A16 has one scale for each row: no engine serves gro"):
        preset("FP8A16").with_group_size(128)
    assert preset("FP8A16").with_group_size(-1) == preset("FP8A16")


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16", "W8A16_ASYM"])
@pytest.mark.parametrize("gpu", ["any", *DEVICES[:-1]])
def test_experts_with_one_scale_a_row_run_by_marlin_alone(name: str, gpu: str) -> None:
    """vLLM asserts groups where it takes Humming: on sm90, and for 8 bits with zero points."""
    model = view(**{"mlp.experts.0.up_proj": (128, 128), "mlp.experts.0.down_proj": (128, 128)})
    newest, old = (VLLMExporter(Target(gpu, engine=at)) for at in ("0.33", "0.26"))
    rows = preset(name).with_group_size(-1)
    said = refusal(newest, model, rows, rows)
    if gpu == "sm90" or name == "W8A16_ASYM":
        where = "" if name == "W8A16_ASYM" else " on sm90"
        assert said == (
            f"layers.0.mlp.experts.0.up_proj: vLLM runs experts in {name} in groups alone{where}: "
            "add --group-size 64"
        )
    else:
        assert said is None
    groups = preset(name).with_group_size(64)
    assert refusal(newest, model, groups, groups) is None
    assert refusal(newest, view(up=(128, 128)), rows) is None
    if name != "W8A16_ASYM":  # which 0.26 does not have
        assert refusal(old, model, rows, rows) is None


def test_experts_with_one_scale_a_row_want_hidden_states_for_marlin() -> None:
    rows = preset("W4A16").with_group_size(-1)
    narrow = view(**{"mlp.experts.0.w1": (128, 192), "mlp.experts.0.w2": (192, 128)})
    for model in (narrow, view(**{"mlp.experts.0.w2": (192, 128)})):
        assert str(refusal(VLLM, model, *[rows] * len(model.linears))).endswith(
            "in groups alone if hidden states are 192 wide, no multiple of 128: add --group-size 32"
        )
    assert refusal(VLLM, view(**{"mlp.experts.0.w2": (128, 192)}), rows) is None
