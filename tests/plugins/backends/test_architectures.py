"""Families of models, quantized: biases, tied heads, merged projections, experts, other names."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from small_deepseek import small_deepseek
from spoilt import forget_checksums
from transformers import AutoModelForCausalLM

import qplug
from qplug.checkpoint.locate import find_model
from qplug.machine.session import Session
from qplug.model.hollow import build
from qplug.reading.folder import open_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Quantized = Callable[..., Path]

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GATED: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS: dict[str, Any] = {**GATED, "num_experts": 4, "moe_intermediate_size": 32}

#: Each family's configuration, how many linears it has to quantize, and what stays float.
FAMILIES: dict[str, tuple[Callable[[], Any], int, set[str]]] = {
    "llama, tied": (
        lambda: transformers.LlamaConfig(**GATED, tie_word_embeddings=True),
        2 * 7,
        {"lm_head"},
    ),
    "llama, untied": (
        lambda: transformers.LlamaConfig(**GATED, tie_word_embeddings=False),
        2 * 7,
        {"lm_head"},
    ),
    "qwen2": (lambda: transformers.Qwen2Config(**GATED), 2 * 7, {"lm_head"}),
    "gemma2": (
        lambda: transformers.Gemma2Config(**GATED, query_pre_attn_scalar=16),
        2 * 7,
        {"lm_head"},
    ),
    "phi3": (lambda: transformers.Phi3Config(**GATED), 2 * 4, {"lm_head"}),
    "opt": (
        lambda: transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
        2 * 6,
        {"lm_head"},
    ),
    "gpt-neox": (
        lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=96),
        2 * 4,
        {"embed_out", r"re:.*\.embed_out$", "lm_head"},
    ),
    "qwen3-moe": (
        lambda: transformers.Qwen3MoeConfig(
            **EXPERTS, num_experts_per_tok=2, decoder_sparse_step=1
        ),
        2 * (4 + 4 * 3),
        {"lm_head", r"re:.*\.mlp\.gate$"},
    ),
    "qwen2-moe": (
        lambda: transformers.Qwen2MoeConfig(
            **EXPERTS, num_experts_per_tok=2, shared_expert_intermediate_size=64
        ),
        2 * (4 + 4 * 3 + 3),
        {"lm_head", r"re:.*\.mlp\.gate$", r"re:.*\.mlp\.shared_expert_gate$"},
    ),
    "mixtral": (
        lambda: transformers.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2),
        2 * (4 + 4 * 3),
        {"lm_head", r"re:.*\.block_sparse_moe\.gate$"},
    ),
    "deepseek-v3": (
        lambda: small_deepseek(**SIZES, moe_intermediate_size=32),
        2 * 5 + 3 + 4 * 3 + 3,
        {"lm_head", r"re:.*\.mlp\.gate$"},
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
MIXTURES = ("qwen3-moe", "qwen2-moe", "mixtral", "deepseek-v3")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a random model of a family as transformers saves it, in bfloat16."""
    made: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(FAMILIES[family][0]()).to(torch.bfloat16)
            for parameter in model.parameters():
                # Biases and norms begin as all 0 and all 1; what they hold should matter.
                parameter.data += 0.05 * torch.randn_like(parameter)
            made[family] = tmp_path_factory.mktemp("source") / "model"
            model.save_pretrained(made[family])
            shutil.copy(find_model("qplug:demo") / "tokenizer.json", made[family])
        return made[family]

    return write


@pytest.fixture(scope="session")
def written(source: Callable[[str], Path], quantized: Quantized) -> Callable[[str], Path]:
    """The family's model in W4A16, in groups of 32."""
    return lambda family: quantized(
        "W4A16", model=str(source(family)), group_size=32, backend="compressed-tensors"
    )


def logits(model: Any) -> Tensor:
    tokens = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model.eval()(tokens).logits
    return found


@every_family
def test_a_skeleton_has_no_weights_and_draws_none(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *_, **__: drawn.append(tensor))
    model = build(FAMILIES[family][0](), tmp_path, trust_remote_code=False)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    # torch itself draws those of an embedding.
    assert len(drawn) <= sum(isinstance(module, torch.nn.Embedding) for module in model.modules())


@every_family
def test_the_folder_is_sound(written: Callable[[str], Path], family: str) -> None:
    _, linears, floats = FAMILIES[family]
    out = written(family)
    found = qplug.verify(str(out))
    assert (found.problems, found.linears) == ((), linears)
    config = open_folder(str(out), Session.alone()).checkpoint.config
    assert set(config["quantization_config"]["ignore"]) == floats


@every_family
def test_the_model_computes_with_the_dequantized_weights(
    source: Callable[[str], Path], written: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """Against a float checkpoint that holds what compressed-tensors makes of the codes."""
    out = written(family)
    folder = open_folder(str(out), Session.alone())
    config = QuantizationConfig.model_validate(folder.checkpoint.config["quantization_config"])
    (group,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    packed = load_file(out / "model.safetensors")
    plain = load_file(source(family) / "model.safetensors")
    for name in folder.schemes:
        parts = {part: packed.get(f"{name}.{part}") for part in ("weight_packed", "weight_scale")}
        shape = packed[f"{name}.weight_shape"]
        restored = compressor.decompress({**parts, "weight_shape": shape}, group)["weight"]
        assert not torch.equal(restored, plain[f"{name}.weight"])
        plain[f"{name}.weight"] = restored
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source(family) / "config.json", tmp_path)

    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(qplug.load(str(out), dtype="bfloat16")), logits(reference))


@every_family
def test_everything_but_the_codes_is_copied(
    source: Callable[[str], Path], written: Callable[[str], Path], family: str
) -> None:
    before = load_file(source(family) / "model.safetensors")
    after = load_file(written(family) / "model.safetensors")
    schemes = open_folder(str(written(family)), Session.alone()).schemes
    copied = before.keys() - {f"{name}.weight" for name in schemes}
    parts = ("weight_packed", "weight_scale", "weight_shape")
    assert after.keys() == copied | {f"{name}.{part}" for name in schemes for part in parts}
    for name in copied:
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))


@every_family
def test_transformers_loads_the_folder(written: Callable[[str], Path], family: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(written(family), dtype=torch.bfloat16)
    ours = qplug.load(str(written(family)), dtype="bfloat16")
    assert torch.equal(logits(theirs), logits(ours))


# --- experts -------------------------------------------------------------------------------------


def without_source(sound: Path, folder: Path, tensors: dict[str, Tensor]) -> str:
    """A copy of ``sound`` that holds ``tensors`` and does not say what it came from."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(sound / "config.json", folder)
    shutil.copy(sound / "tokenizer.json", folder)
    return str(folder)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("gone", ["experts.3.", "experts.1.", "experts.2.w1|experts.2.gate_proj"])
def test_a_missing_expert_is_named(
    written: Callable[[str], Path], tmp_path: Path, family: str, gone: str
) -> None:
    sound = written(family)
    tensors = load_file(sound / "model.safetensors")
    last = [name for name in tensors if "layers.1." in name and ".experts." in name]
    dropped = {name for name in last if any(part in name for part in gone.split("|"))}
    out = without_source(sound, tmp_path, {n: t for n, t in tensors.items() if n not in dropped})
    problems = qplug.verify(out, backend="vllm").problems
    named = {(problem.check, problem.where) for problem in problems if problem.check != "kernel"}
    assert named == {("missing", f"{name.rpartition('.')[0]}.weight") for name in dropped}
    with pytest.raises(qplug.QplugError, match=r"experts.* (are|is) missing, or"):
        qplug.load(out)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("part", [".experts.3.", ".gate.weight"])
def test_a_source_without_an_expert_or_router_is_refused(
    source: Callable[[str], Path], tmp_path: Path, family: str, part: str
) -> None:
    whole = source(family)
    tensors = load_file(whole / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert kept.keys() < tensors.keys()
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(qplug.QplugError, match=r"the checkpoint lacks model\.layers\."):
        qplug.quantize(without_source(whole, model, kept), tmp_path / "out", group_size=32)
    assert not (tmp_path / "out").exists()


def test_a_missing_router_is_named(written: Callable[[str], Path], tmp_path: Path) -> None:
    sound = written("qwen3-moe")
    tensors = load_file(sound / "model.safetensors")
    router = "model.layers.1.mlp.gate.weight"
    del tensors[router]
    out = without_source(sound, tmp_path, tensors)
    (problem,) = qplug.verify(out, backend="compressed-tensors").problems
    assert (problem.check, problem.where) == ("missing", router)


def test_an_expert_of_another_shape_is_named(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    sound = written("qwen3-moe")
    tensors = load_file(sound / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj"
    for part in ("weight_packed", "weight_scale"):
        tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][:-1].contiguous()
    tensors[f"{name}.weight_shape"] -= torch.tensor([1, 0])
    out = without_source(sound, tmp_path, tensors)
    (problem,) = qplug.verify(out, backend="compressed-tensors").problems
    assert (problem.check, problem.where) == ("shape", f"{name}.weight")


def test_a_router_that_the_config_quantizes_is_named(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    sound = written("qwen3-moe")
    out = without_source(sound, tmp_path, load_file(sound / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    problems = qplug.verify(out, backend="compressed-tensors").problems
    routers = {f"model.layers.{block}.mlp.gate" for block in range(2)}
    assert {problem.where for problem in problems if problem.check == "head"} == routers


@pytest.mark.parametrize("pattern", ["mlp.gate", "re:.*mlp.gate"])
def test_a_router_pattern_that_takes_gate_proj_along_is_named(
    written: Callable[[str], Path], tmp_path: Path, pattern: str
) -> None:
    # A dense model has no mlp.gate, but "mlp.gate" is a part of "mlp.gate_proj".
    sound = written("llama, untied")
    out = without_source(sound, tmp_path, load_file(sound / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"].append(pattern)
    (tmp_path / "config.json").write_text(json.dumps(config))
    hit = {f"model.layers.{block}.mlp.gate_proj" for block in range(2)}
    problems = qplug.verify(out, backend="sglang", engine_version="0.5.16").problems
    assert {problem.where for problem in problems if problem.check == "ignore"} == hit
    # Newer versions match plain names as they are.
    newest = qplug.verify(out, backend="sglang").problems
    named = {problem.where for problem in newest if problem.check == "ignore"}
    assert named == (hit if pattern.startswith("re:") else set())


def test_experts_in_ignore_that_hold_codes_are_named(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    sound = written("qwen3-moe")
    out = without_source(sound, tmp_path, load_file(sound / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"].append(r"re:.*\.mlp\.experts\..*")
    (tmp_path / "config.json").write_text(json.dumps(config))
    problems = qplug.verify(out, backend="compressed-tensors").problems
    named = {problem.where for problem in problems if problem.check == "ignore"}
    assert named
    assert all(".experts." in name for name in named)


def test_scales_of_an_expert_that_saw_no_token_are_named(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    sound = written("qwen3-moe")
    tensors = load_file(sound / "model.safetensors")
    expert = "model.layers.1.mlp.experts.2.down_proj"
    tensors[f"{expert}.weight_scale"].fill_(float("nan"))
    out = without_source(sound, tmp_path, tensors)
    (problem,) = qplug.verify(out, backend="compressed-tensors").problems
    assert (problem.check, problem.where) == ("scale", expert)


def test_codes_of_two_experts_that_are_swapped_are_named(
    source: Callable[[str], Path], written: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a wrong order of fused experts comes to: shapes fit, and every rule is kept."""
    sound = written("qwen3-moe")
    shutil.copytree(sound, tmp_path / "out")
    tensors = load_file(sound / "model.safetensors")
    one, two = (f"model.layers.0.mlp.experts.{number}.up_proj" for number in (0, 1))
    for part in ("weight_packed", "weight_scale"):
        first, second = tensors[f"{one}.{part}"], tensors[f"{two}.{part}"]
        tensors[f"{one}.{part}"], tensors[f"{two}.{part}"] = second, first
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    spoilt = forget_checksums(tmp_path / "out")
    problems = qplug.verify(str(spoilt), against=str(source("qwen3-moe"))).problems
    assert {(problem.check, problem.where) for problem in problems} == {
        ("error", one),
        ("error", two),
    }


def test_experts_in_int8_are_not_for_sglang(
    source: Callable[[str], Path], quantized: Quantized
) -> None:
    model = str(source("qwen3-moe"))
    with pytest.raises(qplug.QplugError, match=r"SGLang 0\.5\.23 runs no experts in W8A8"):
        qplug.quantize(model, "never", scheme="W8A8", backend="sglang")
    out = str(quantized("W8A8", model=model, backend="compressed-tensors"))
    problems = qplug.verify(out, backend="sglang").problems
    named = {problem.where for problem in problems if "runs no experts" in problem.message}
    assert named
    assert all(".experts." in name for name in named)


def test_experts_in_fp8_with_float_inputs_are_for_no_engine(
    source: Callable[[str], Path], quantized: Quantized
) -> None:
    model = str(source("qwen3-moe"))
    out = str(quantized("FP8A16_TENSOR", model=model, backend="compressed-tensors"))
    assert qplug.verify(out).ok
    for backend in ("vllm", "sglang"):
        problems = qplug.verify(out, backend=backend).problems
        named = {problem.where for problem in problems if "runs no experts" in problem.message}
        assert len(named) == 2 * 3 * 4  # blocks, projections, experts
        assert all(".experts." in name for name in named)


def test_experts_as_narrow_as_a_group_are_not_for_vllm(
    written: Callable[[str], Path], source: Callable[[str], Path]
) -> None:
    """They are 32 wide and read 64: vLLM 0.26 puts the scales of two groups in the order of one."""
    name = "model.layers.0.mlp.experts.0.gate_proj"
    found = qplug.verify(str(written("qwen3-moe")), backend="vllm").problems
    narrow = [problem.where for problem in found if "no wider than a group" in str(problem)]
    assert narrow == [name]
    model = str(source("qwen3-moe"))
    with pytest.raises(qplug.QplugError, match="no wider than a group of 32: take a smaller"):
        qplug.quantize(model, "never", group_size=32, backend="vllm", backend_options={"tp": 1})
    found = qplug.verify(str(written("qwen3-moe")), backend="compressed-tensors").problems
    assert not found
