"""Every rule of a loader has a fault planted that it must name, and sound folders break none."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qplug
from qplug.machine.session import Session
from qplug.reading.folder import open_folder
from qplug_compressed_tensors import rules, silent
from qplug_compressed_tensors.configuration import Configuration
from qplug_compressed_tensors.engine import CompressedTensorsLoader
from qplug_compressed_tensors.rules import Case
from qplug_sglang.engine import SGLang
from qplug_sglang.int4_fp8 import int4_fp8_is_of_experts
from qplug_sglang.shared_experts import shared_experts_are_as_routed_ones
from qplug_sglang.unpacked import latent_projections_are_unpacked

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from qplug_compressed_tensors.rules import Rule

    Quantized = Callable[..., Path]

BACKENDS = ("compressed-tensors", "vllm", "sglang")
O_PROJ = "model.layers.1.self_attn.o_proj"
Q_PROJ = "model.layers.1.self_attn.q_proj"
INPUT, ONE = f"{O_PROJ}.input_scale", torch.ones(1)
K_SCALE = "model.layers.1.self_attn.k_scale"
DOWN = "model.layers.0.mlp.down_proj"
#: Every linear of the demo model.
LINEARS = [
    f"model.layers.{block}.{part}_proj"
    for block in range(4)
    for part in (
        *(f"self_attn.{letter}" for letter in "qkvo"),
        *(f"mlp.{word}" for word in ("gate", "up", "down")),
    )
]


# --- sound folders -------------------------------------------------------------------------------
#
# That of every scheme and backend is in test_run.


@pytest.mark.parametrize("backend", ["compressed-tensors", "vllm", "fake"])
def test_a_folder_with_scales_of_a_cache_is_sound(quantized: Quantized, backend: str) -> None:
    out = str(quantized("W8A8", backend=backend, kv_cache="fp8"))
    assert qplug.verify(out).problems == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_one_backend_writes_is_sound_to_the_others(quantized: Quantized, backend: str) -> None:
    for scheme in ("W4A16_ASYM", "W8A8"):
        for reader in BACKENDS:
            out = str(quantized(scheme, backend=backend))
            assert qplug.verify(out, backend=reader).problems == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_partly_float_folder_is_sound(quantized: Quantized, backend: str) -> None:
    ignore = ("*.down_proj", "model.layers.0.self_attn.*")
    found = qplug.verify(str(quantized("W4A16", backend=backend, ignore=ignore)))
    assert (found.problems, found.linears) == ((), 28 - 4 - 4)


def test_two_widths_in_one_format_are_sound_everywhere(quantized: Quantized) -> None:
    out = str(quantized("W4A16", backend="sglang", overrides={"*.mlp.*": "W8A16"}))
    for reader in BACKENDS:
        assert qplug.verify(out, backend=reader).problems == ()


# --- faulty folders ------------------------------------------------------------------------------


@dataclass
class Draft:
    """A folder's ``config.json`` and tensors, to damage."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    @property
    def groups(self) -> list[dict[str, Any]]:
        return list(self.quantization["config_groups"].values())


@dataclass(frozen=True)
class Fault:
    """What is done to a sound folder, the rule that must see it, and all that is to be said.

    ``made`` are the options of the run that wrote the folder; ``said`` are pairs of check and
    place, and nothing else may be said. ``engine`` is the version
    whose rules hold.
    """

    name: str
    rule: Rule
    damage: Callable[[Draft], None]
    said: set[tuple[str, str]]
    scheme: str = "W4A16"
    made: dict[str, Any] = field(default_factory=dict)
    backend: str = "sglang"
    engine: str | None = None


def nothing(draft: Draft) -> None:
    """The folder is sound, but not for the backend that reads it."""


def call_it(name: str) -> Callable[[Draft], None]:
    return lambda draft: draft.quantization.update(format=name)


def ignore(*entries: str) -> Callable[[Draft], None]:
    return lambda draft: draft.quantization["ignore"].extend(entries)


def forget(*entries: str) -> Callable[[Draft], None]:
    def damage(draft: Draft) -> None:
        for entry in entries:
            draft.quantization["ignore"].remove(entry)

    return damage


def drop(*names: str) -> Callable[[Draft], None]:
    def damage(draft: Draft) -> None:
        for name in names:
            del draft.tensors[name]

    return damage


def put(name: str, tensor: Tensor) -> Callable[[Draft], None]:
    return lambda draft: draft.tensors.update({name: tensor})


def change(name: str, how: Callable[[Tensor], Tensor]) -> Callable[[Draft], None]:
    return lambda draft: draft.tensors.update({name: how(draft.tensors[name]).contiguous()})


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    def how(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        return tensor

    return how


def give_groups_their_own_format(draft: Draft) -> None:
    draft.quantization["format"] = "pack-quantized"  # which vLLM takes: the group's own one wins


def take_formats_of_groups_away(draft: Draft) -> None:
    for group in draft.groups:
        del group["format"]


def name_the_parts_alone(draft: Draft) -> None:
    """As other quantizers write it; SGLang then finds no scheme, or the wrong one."""
    for named in (draft.quantization, *draft.groups):
        for key in ("ignore", "targets"):
            if key in named:
                merged = ("qkv_proj", "gate_up_proj")
                named[key] = [e for e in named[key] if not any(name in e for name in merged)]


def forget_a_float_layer(draft: Draft) -> None:
    draft.quantization["ignore"] = [
        entry for entry in draft.quantization["ignore"] if "down_proj" not in entry
    ]


def make_q_wider_than_k(draft: Draft) -> None:
    """All that a folder needs to hold q_proj in 8 bits, in a group of its own."""
    group = json.loads(json.dumps(draft.groups[0]))
    draft.groups[0]["targets"] = [r"re:.*\.(?!q_proj)\w+_proj$"]
    group["targets"] = [r"re:.*\.q_proj$"]
    group["weights"]["num_bits"] = 8
    draft.quantization["config_groups"]["group_1"] = group
    for name, packed in draft.tensors.items():
        if name.endswith("q_proj.weight_packed"):
            draft.tensors[name] = packed.repeat(1, 2)


SPLIT: dict[str, Any] = {"backend": "vllm", "overrides": {"*.mlp.*": "W8A8"}}
SPLIT_TARGETS = (
    r"re:.*\.self_attn\.k_proj$, re:.*\.self_attn\.o_proj$, "
    r"re:.*\.self_attn\.q_proj$, re:.*\.self_attn\.qkv_proj$, re:.*\.self_attn\.v_proj$",
    r"re:.*\.mlp\.down_proj$, re:.*\.mlp\.gate_proj$, re:.*\.mlp\.gate_up_proj$, "
    r"re:.*\.mlp\.up_proj$",
)
Q_K_V = [
    ", ".join(f"model.layers.{block}.self_attn.{part}_proj" for part in "kqv") for block in range(4)
]

FAULTS = [
    # --- the format
    Fault("unknown format", rules.known_format, call_it("marlin-24"), {("format", "Linear")}),
    Fault("another format", rules.known_format, call_it("int-quantized"), {("format", "Linear")}),
    Fault(
        "int8 called packed",
        rules.known_format,
        call_it("pack-quantized"),
        {("format", "Linear")},
        scheme="W8A8",
    ),
    Fault(
        "mixed, but no group says which",
        rules.known_format,
        take_formats_of_groups_away,
        {("format", where) for where in SPLIT_TARGETS},
        made=SPLIT,
        backend="vllm",
    ),
    Fault(
        "merged matrices in no group",
        silent.merged_matrices_are_named,
        name_the_parts_alone,
        {
            ("merged", f"model.layers.{block}.{name}")
            for block, name in product(range(4), ("self_attn.qkv_proj", "mlp.gate_up_proj"))
        },
        made={"overrides": {"*.down_proj": "W8A16"}},
    ),
    Fault(
        "merged matrices not ignored",
        silent.merged_matrices_are_named,
        name_the_parts_alone,
        {("merged", f"model.layers.{block}.self_attn.qkv_proj") for block in range(4)},
        made={"ignore": ["*.self_attn.?_proj"]},
    ),
    Fault(
        "mixed formats on SGLang",
        rules.formats_of_groups_count,
        nothing,
        {("format", where) for where in SPLIT_TARGETS},
        made=SPLIT,
        engine="0.5.16",
    ),
    Fault(
        "a group's own format on SGLang",
        rules.formats_of_groups_count,
        give_groups_their_own_format,
        {("format", SPLIT_TARGETS[1])},
        made=SPLIT,
        engine="0.5.16",
    ),
    # --- what stays float
    Fault(
        "tied head not in ignore",
        rules.float_linears_are_ignored,
        forget("lm_head"),
        {("ignore", "lm_head")},
    ),
    Fault(
        "float layer in no group",
        rules.float_linears_are_ignored,
        forget_a_float_layer,
        {("ignore", f"model.layers.{block}.mlp.down_proj") for block in range(4)},
        made={"overrides": {"*.mlp.*": "W8A16"}, "ignore": ("*.down_proj",)},
    ),
    Fault(
        "float layer that the config quantizes",
        rules.codes_are_laid_out,
        forget_a_float_layer,
        {
            (check, f"model.layers.{block}.mlp.down_proj")
            for block in range(4)
            for check in ("missing", "unexpected")
        },
        made={"ignore": ("*.down_proj",)},
    ),
    Fault(
        "head of its own not in ignore",
        rules.head_is_as_the_loader_takes_it,
        forget("lm_head"),
        {("head", "lm_head"), ("missing", "lm_head"), ("unexpected", "lm_head")},
        made={"model": "narrow", "backend": "compressed-tensors", "group_size": -1},
        backend="compressed-tensors",
    ),
    Fault(
        "codes in a layer that is ignored",
        rules.floats_are_float,
        ignore(O_PROJ),
        {("ignore", O_PROJ), ("missing", f"{O_PROJ}.weight")},
    ),
    Fault(
        "int8 in a layer that is ignored",
        rules.floats_are_float,
        ignore(O_PROJ),
        {("ignore", O_PROJ)},
        scheme="W8A8",
    ),
    Fault(
        "a plain name that is a part of others, on SGLang",
        rules.floats_are_float,
        ignore("layers.1.self_attn.o"),
        {("ignore", O_PROJ), ("missing", f"{O_PROJ}.weight")},
        engine="0.5.16",
    ),
    Fault(
        "a plain name that is the end of another, on SGLang",
        rules.floats_are_float,
        ignore("layers.1.self_attn.o_proj"),
        {("ignore", O_PROJ), ("missing", f"{O_PROJ}.weight")},
    ),
    # --- what is merged
    Fault(
        "q wider than k",
        rules.fused_linears_agree,
        make_q_wider_than_k,
        {("fused", where) for where in Q_K_V},
    ),
    Fault(
        "q ignored, k not",
        rules.fused_linears_agree,
        ignore(Q_PROJ),
        {("fused", Q_K_V[1]), ("ignore", Q_PROJ), ("missing", f"{Q_PROJ}.weight")},
    ),
    # --- tensors
    *(
        Fault(
            f"no {local} ({scheme})",
            rules.codes_are_laid_out,
            drop(f"{O_PROJ}.{local}"),
            {("missing", O_PROJ)},
            scheme=scheme,
        )
        for scheme, local in (
            ("W4A16", "weight_packed"),
            ("W4A16", "weight_scale"),
            ("W4A16", "weight_shape"),
            ("W4A16_ASYM", "weight_zero_point"),
            ("W8A8", "weight"),
            ("W8A8", "weight_scale"),
            ("FP8_BLOCK", "weight_scale"),
        )
    ),
    *(
        Fault(
            f"{local} beside the codes",
            rules.codes_are_laid_out,
            put(f"{O_PROJ}.{local}", tensor),
            {("unexpected", O_PROJ)},
        )
        for local, tensor in (
            ("weight", torch.zeros(256, 256, dtype=torch.bfloat16)),
            ("weight_g_idx", torch.zeros(256, dtype=torch.int32)),
            ("weight_zero_point", torch.zeros(32, 2, dtype=torch.int32)),
            ("input_scale", torch.ones(1)),
        )
    ),
    *(
        Fault(
            f"dtype of {local} ({scheme})",
            rules.codes_are_laid_out,
            change(f"{O_PROJ}.{local}", lambda tensor, to=dtype: tensor.float().to(to)),
            {("dtype", O_PROJ)},
            scheme=scheme,
        )
        for scheme, local, dtype in (
            ("W4A16", "weight_packed", torch.int64),
            ("W4A16", "weight_scale", torch.float64),
            ("W4A16", "weight_shape", torch.int32),
            ("W8A8", "weight", torch.bfloat16),
            ("FP8_DYNAMIC", "weight", torch.float8_e5m2),
        )
    ),
    *(
        Fault(
            f"shape of {local} ({scheme})",
            rules.codes_are_laid_out,
            change(f"{O_PROJ}.{local}", how),
            {("shape", O_PROJ)},
            scheme=scheme,
        )
        for scheme, local, how in (
            ("W4A16", "weight_packed", lambda tensor: tensor[:, :-1]),
            ("W4A16", "weight_packed", lambda tensor: tensor.T),
            ("W4A16", "weight_scale", lambda tensor: tensor[:, :1]),
            ("W4A16", "weight_scale", lambda tensor: tensor.T),
            ("W4A16_ASYM", "weight_zero_point", lambda tensor: tensor.repeat(8, 1)),
            ("W8A8", "weight", lambda tensor: tensor[1:]),
            ("W8A8", "weight_scale", lambda tensor: tensor[:, 0]),
            ("FP8_BLOCK", "weight_scale", lambda tensor: tensor[:1]),
        )
    ),
    # --- kernels
    *(
        Fault(
            f"too narrow for {backend}",
            rules.kernels_take_the_shapes,
            nothing,
            {
                ("kernel", f"model.layers.{block}.{part}_proj")
                for block in range(2)
                for part in (
                    *(f"self_attn.{each}" for each in "qkvo"),
                    *(f"mlp.{each}" for each in ("gate", "up", "down")),
                )
            },
            made={"model": "narrow", "backend": "compressed-tensors", "group_size": -1},
            backend=backend,
        )
        for backend in ("vllm", "sglang")
    ),
    # --- numbers
    *(
        Fault(
            f"a scale of {value} ({scheme})",
            rules.numbers_are_sound,
            change(f"{O_PROJ}.weight_scale", spoil(value)),
            {("scale", O_PROJ)},
            scheme=scheme,
        )
        for scheme in ("W4A16", "FP8_DYNAMIC")
        for value in (0.0, -1.0, float("nan"), float("inf"))
    ),
    *(
        Fault(
            f"weight_shape is {shape}",
            rules.numbers_are_sound,
            put(f"{DOWN}.weight_shape", torch.tensor(shape)),
            {("weight_shape", DOWN)},
        )
        for shape in ([768, 256], [256, 767], [0, 0])
    ),
    Fault(
        "weight_shape is no shape",
        rules.numbers_are_sound,
        put(f"{DOWN}.weight_shape", torch.tensor(768)),
        {("weight_shape", DOWN), ("shape", DOWN)},
    ),
]


FAULTS += [
    # --- scales of inputs and of the KV cache
    *(
        Fault(
            f"{name} of a static input ({scheme})",
            rule,
            damage,
            {(check, O_PROJ)},
            scheme=scheme,
            made={"backend": "vllm"},
            backend="vllm",
        )
        for scheme in ("FP8", "W8A8_STATIC")
        for name, rule, damage, check in (
            ("no scale", rules.codes_are_laid_out, drop(INPUT), "missing"),
            ("two scales", rules.codes_are_laid_out, put(INPUT, torch.ones(2)), "shape"),
            ("scale in int8", rules.codes_are_laid_out, put(INPUT, ONE.to(torch.int8)), "dtype"),
            ("zero scale", rules.numbers_are_sound, put(INPUT, torch.zeros(1)), "scale"),
            ("infinite scale", rules.numbers_are_sound, put(INPUT, ONE / 0), "scale"),
        )
    ),
    Fault(
        "scale of inputs that are dynamic",
        rules.codes_are_laid_out,
        put(INPUT, ONE),
        {("unexpected", O_PROJ)},
        scheme="W8A8",
    ),
    *(
        Fault(
            f"{name} of a cache",
            rules.cache_scales_are_whole,
            damage,
            {said},
            made={"backend": "vllm", "kv_cache": "fp8"},
            backend="vllm",
        )
        for name, damage, said in (
            ("no scale", drop(K_SCALE), ("missing", "model.layers.1")),
            ("a scale elsewhere", put(f"{Q_PROJ}.v_scale", ONE), ("missing", "model.layers.1")),
            ("two scales", put(K_SCALE, torch.ones(2)), ("shape", K_SCALE)),
            ("scale in int8", put(K_SCALE, ONE.to(torch.int8)), ("shape", K_SCALE)),
            ("negative scale", put(K_SCALE, -ONE), ("scale", K_SCALE)),
            ("scale that is NaN", put(K_SCALE, ONE * torch.nan), ("scale", K_SCALE)),
            (
                "integers",
                lambda draft: draft.quantization["kv_cache_scheme"].update(type="int"),
                ("cache", "config.json"),
            ),
        )
    ),
    Fault(
        "scale of a cache that is float",
        rules.cache_scales_are_whole,
        put(K_SCALE, ONE),
        {("unexpected", K_SCALE)},
    ),
    Fault(
        "scales of a cache on SGLang",
        rules.cache_scales_are_read,
        nothing,
        {("cache", "config.json")},
        made={"backend": "vllm", "kv_cache": "fp8"},
        engine="0.5.16",
    ),
    Fault(
        "scales of a cache for a model whose loader on SGLang drops them",
        rules.cache_scales_are_read,
        lambda draft: draft.config.update(architectures=["LlamaOfTheHouse"]),
        {("cache", "config.json")},
        made={"backend": "vllm", "kv_cache": "fp8"},
    ),
]


def say(field: str, value: object) -> Callable[[Draft], None]:
    return lambda draft: draft.groups[0]["weights"].update({field: value})


def tell(part: str, value: object) -> Callable[[Draft], None]:
    return lambda draft: draft.quantization.update({part: value})


def target_the_class(draft: Draft) -> None:
    (group,) = (group for group in draft.groups if group["weights"]["num_bits"] == 4)
    group["targets"] = ["Linear"]


def quantize_the_embedding(draft: Draft) -> None:
    rows, columns = draft.tensors.pop("model.embed_tokens.weight").shape
    draft.tensors["model.embed_tokens.weight_packed"] = torch.ones(
        rows, columns // 8, dtype=torch.int32
    )
    draft.tensors["model.embed_tokens.weight_scale"] = torch.ones(rows, columns // 128)


FAULTS += [
    # --- what engines load without a word
    Fault(
        "rotations as the model runs",
        silent.config_is_understood,
        tell("transform_config", {"config_groups": {"R4": {"type": "hadamard", "apply": []}}}),
        {("config", "transform_config")},
    ),
    Fault(
        "sparse weights",
        silent.config_is_understood,
        tell("sparsity_config", {"format": "sparse-24-bitmask"}),
        {("config", "sparsity_config")},
    ),
    Fault(
        "columns in an order of their own",
        silent.config_is_understood,
        say("actorder", "group"),
        {("config", "group_0.weights.actorder")},
    ),
    Fault(
        "a field of a newer format",
        silent.config_is_understood,
        say("global_scale_dtype", "float64"),
        {("config", "group_0.weights.global_scale_dtype")},
    ),
    Fault(
        "a group by class before one by names",
        silent.merged_linears_keep_their_group,
        target_the_class,
        {("order", where) for where in Q_K_V},
        made={"overrides": {"*.self_attn.[qkv]_proj": "W8A16"}},
    ),
    Fault(
        "a part of a linear in ignore",
        silent.ignored_names_are_linears,
        ignore(f"{O_PROJ}.linear"),
        {("ignore", f"{O_PROJ}.linear")},
    ),
    Fault(
        "a quantized embedding",
        silent.embedding_is_float,
        quantize_the_embedding,
        {("embedding", "model.embed_tokens"), ("missing", "model.embed_tokens.weight")},
    ),
    Fault(
        "static int8 on SGLang",
        rules.kernels_take_the_shapes,
        nothing,
        {("kernel", name) for name in LINEARS},
        scheme="W8A8_STATIC",
        made={"backend": "vllm"},
    ),
    Fault(
        "NVFP4 that is not ModelOpt's, on SGLang",
        rules.formats_are_read,
        nothing,
        {("format", name) for name in LINEARS},
        scheme="NVFP4",
        made={"backend": "vllm"},
        engine="0.5.16",
    ),
    Fault(
        "global scales of merged matrices",
        silent.merged_scales_agree,
        change(f"{Q_PROJ}.weight_global_scale", lambda scale: scale * 2),
        {("fused", Q_K_V[1])},
        scheme="NVFP4A16",
    ),
]


def test_every_rule_has_a_fault() -> None:
    experts = silent.experts_have_a_kernel  # has its test where there are experts
    embeddings = rules.embedding_is_as_the_loader_takes_it  # has its tests in test_embedding
    tested = {experts, embeddings, *(fault.rule for fault in FAULTS)}
    tested.add(int4_fp8_is_of_experts)  # has its tests in test_sglang_int4_fp8
    tested.add(latent_projections_are_unpacked)  # has its tests in test_sglang_unpacked
    tested.add(shared_experts_are_as_routed_ones)  # has its tests in test_sglang_unpacked
    assert tested == {*rules.FORMAT_RULES, *SGLang.rules}


@pytest.fixture
def damaged(
    quantized: Quantized, narrow_llama: Path, tmp_path: Path
) -> Callable[[str, dict[str, Any], Callable[[Draft], None]], Path]:
    """Writes a copy of a sound folder with a fault in it, and without what tells its source."""

    def write(scheme: str, made: dict[str, Any], damage: Callable[[Draft], None]) -> Path:
        model = {"narrow": str(narrow_llama)}.get(made.get("model", ""), "qplug:demo")
        sound = quantized(scheme, **{"backend": "sglang", **made, "model": model})
        draft = Draft(
            json.loads((sound / "config.json").read_text()),
            load_file(sound / "model.safetensors"),
        )
        damage(draft)
        (tmp_path / "config.json").write_text(json.dumps(draft.config))
        save_file(draft.tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(sound / "tokenizer.json", tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_rule_names_the_fault(damaged: Any, fault: Fault) -> None:
    out = damaged(fault.scheme, fault.made, fault.damage)
    problems = qplug.verify(str(out), backend=fault.backend, engine_version=fault.engine).problems
    assert {(problem.check, problem.where) for problem in problems} == fault.said

    folder = open_folder(str(out), Session.alone(), backend=fault.backend, engine=fault.engine)
    assert folder.exporter is not None
    stored_as, engine = folder.exporter.format, folder.exporter.engine
    assert isinstance(engine, CompressedTensorsLoader)
    config = Configuration.parse(
        folder.checkpoint.config["quantization_config"], plain=engine.loader.plain
    )
    case = Case(
        folder.checkpoint,
        folder.view,
        config,
        stored_as,
        engine.capabilities(),
        engine.loader,
        engine.release,
    )
    seen = list(fault.rule(case))
    assert seen
    assert set(seen) <= set(problems)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("", rules.floats_are_float, ignore("layers.1.self_attn.o"), set()),
        Fault("", rules.formats_of_groups_count, nothing, set(), made=SPLIT),
        Fault("", rules.formats_of_groups_count, give_groups_their_own_format, set(), made=SPLIT),
    ],
    ids=["part of a name", "mixed formats", "a group's own format"],
)
def test_faults_of_an_old_sglang_alone_are_none_to_others(damaged: Any, fault: Fault) -> None:
    out = damaged(fault.scheme, fault.made, fault.damage)
    for backend in ("vllm", "sglang"):
        assert qplug.verify(str(out), backend=backend).problems == ()


def test_group_sizes_without_a_kernel_are_named(quantized: Quantized) -> None:
    out = str(quantized("W4A16", group_size=16, backend="compressed-tensors"))
    assert qplug.verify(out).problems == ()
    for backend in ("vllm", "sglang"):
        problems = qplug.verify(out, backend=backend).problems
        assert len(problems) == 28
        assert {problem.check for problem in problems} == {"kernel"}
        assert "takes groups of 32, 64, 128, -1, not 16" in problems[0].message


# --- beside the rules: what any model must have ---------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    ["model.norm.weight", "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"],
)
def test_a_tensor_that_is_missing_is_named_without_the_source(damaged: Any, tensor: str) -> None:
    out = damaged("W4A16", {}, drop(tensor))
    (problem,) = qplug.verify(str(out), backend="vllm").problems
    assert (problem.check, problem.where) == ("missing", tensor)
    with pytest.raises(qplug.QplugError, match=r"is missing, or has the wrong shape"):
        qplug.load(str(out))


def test_a_tensor_of_another_shape_is_named_without_the_source(damaged: Any) -> None:
    out = damaged("W4A16", {}, change("model.norm.weight", lambda tensor: tensor[:-1]))
    (problem,) = qplug.verify(str(out), backend="vllm").problems
    assert (problem.check, problem.where) == ("shape", "model.norm.weight")
    with pytest.raises(qplug.QplugError, match=r"model\.norm\.weight is missing, or has"):
        qplug.load(str(out))


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.buf_invperm", "model.R4.weight"])
def test_a_tensor_that_belongs_to_nothing_is_named(damaged: Any, name: str) -> None:
    out = damaged("W4A16", {}, put(name, torch.zeros(64)))
    (problem,) = qplug.verify(str(out), backend="vllm", against="qplug:demo").problems
    assert (problem.check, problem.where) == ("unexpected", name)


def test_codes_that_are_larger_than_the_floats_are_sound(quantized: Quantized) -> None:
    """Codes that each have a scale of their own take more than the floats did, as was asked."""
    options = {"group_size": 1, "backend": "compressed-tensors"}
    assert qplug.verify(str(quantized("W8A16", **options))).ok


def test_blocks_of_fp8_of_another_method_are_one_line(quantized: Quantized, tmp_path: Path) -> None:
    """SGLang serves garbage from ``quant_method: fp8``: no exporter of qplug writes it."""
    folder = shutil.copytree(quantized("FP8_BLOCK", backend="vllm"), tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[f"{name}_inv"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "qplug.json").unlink()
    with pytest.raises(qplug.QplugError, match="'fp8' is another format's, not compressed-tensors"):
        qplug.verify(str(folder), backend="sglang")


def test_nan_among_the_codes_is_named_without_the_source(damaged: Any) -> None:
    out = damaged("FP8_DYNAMIC", {}, change(f"{O_PROJ}.weight", not_a_number))
    (problem,) = qplug.verify(str(out), backend="vllm").problems
    assert (problem.check, problem.where) == ("values", O_PROJ)


def test_nan_among_the_codes_is_named_with_the_source(damaged: Any) -> None:
    out = damaged("FP8_DYNAMIC", {}, change(f"{O_PROJ}.weight", not_a_number))
    found = qplug.verify(str(out), backend="vllm", against="qplug:demo")
    assert ("values", O_PROJ) in {(problem.check, problem.where) for problem in found.problems}


def not_a_number(codes: Tensor) -> Tensor:
    codes = codes.clone()
    codes.view(torch.uint8)[3, 5] = 0x7F
    return codes


def test_a_folder_of_another_backend_is_one_line(quantized: Quantized) -> None:
    plain = str(quantized("W4A16", backend="fake"))
    (problem,) = qplug.verify(plain, backend="vllm").problems
    assert str(problem) == "format: config.json: has no quantization_config"
    with pytest.raises(qplug.QplugError, match="another backend's"):
        qplug.verify(str(quantized("W4A16", backend="vllm")), backend="fake")
