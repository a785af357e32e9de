"""ModelOpt's folders as others write them: each algorithm, alone and beside others.

Tensors are those that SGLang 0.5.23 and vLLM 0.33 create (modelopt_quant.py, fp8.py, modelopt.py);
their weights are computed here by plain arithmetic, which shares no code with qplug.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qplug
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.reading.folder import open_folder
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Store = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])


def fp4(weight: Tensor, *, inputs: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Any codes, since no value is compared with the model's."""
    out, width = weight.shape
    packed = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8)
    scale, unit = (torch.rand(out, width // 16) + 0.5).to(torch.float8_e4m3fn), torch.tensor(0.03)
    codes = E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()]
    stored = {"weight": packed, "weight_scale": scale, "weight_scale_2": unit}
    if inputs:
        stored["input_scale"] = torch.tensor(0.013)
    return stored, codes * (scale.float() * unit).repeat_interleave(16, 1)


def fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Scalars, as NVIDIA publishes them: ``[]``, not ``[1]``."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.013)}
    return stored, codes.float() * scale


def fp8_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None]


def fp8_blocks(weight: Tensor, *, local: str, axes: int) -> tuple[dict[str, Tensor], Tensor]:
    out, width = weight.shape
    tiles = weight.view(out // 128, 128, width // 128, 128)
    scale = tiles.abs().amax((1, 3), keepdim=True) / 448
    codes = (tiles / scale).to(torch.float8_e4m3fn)
    stored = scale if axes == 4 else scale.view(out // 128, width // 128)
    return {"weight": codes.view(out, width), local: stored}, (codes.float() * scale).view(
        out, width
    )


def mxfp8(weight: Tensor, *, local: str) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.view(len(weight), -1, 32)
    exponent = (groups.abs().amax(2) / 448).log2().ceil()
    codes = (groups / exponent.exp2()[..., None]).to(torch.float8_e4m3fn)
    stored = {"weight": codes.flatten(1), local: (exponent + 127).to(torch.uint8)}
    return stored, (codes.float() * exponent.exp2()[..., None]).flatten(1)


INVERSE = "weight_scale_inv"
#: How SGLang 0.5.23 has each algorithm stored, the scheme it stands for, and the releases with it.
STORES: dict[str, tuple[Store, str, set[str]]] = {
    "NVFP4": (partial(fp4, inputs=True), "NVFP4", {"0.5.16", "0.5.23"}),
    "W4A16_NVFP4": (partial(fp4, inputs=False), "NVFP4A16", {"0.5.16", "0.5.23"}),
    "FP8": (fp8, "FP8", {"0.5.16", "0.5.23"}),
    "FP8_PB_WO": (partial(fp8_blocks, local=INVERSE, axes=2), "FP8_BLOCK", {"0.5.23"}),
    "FP8_BLOCK_SCALES": (partial(fp8_blocks, local=INVERSE, axes=2), "FP8_BLOCK", {"0.5.23"}),
    "MXFP8": (partial(mxfp8, local=INVERSE), "MXFP8", {"0.5.23"}),
}
#: Tensors as ModelOpt exports them, and vLLM reads them alone.
IN_VLLM: dict[str, tuple[Store, str]] = {
    "FP8_PB_WO": (partial(fp8_blocks, local="weight_scale", axes=4), "FP8_BLOCK"),
    "MXFP8": (partial(mxfp8, local="weight_scale"), "MXFP8"),
    "FP8_PER_CHANNEL_PER_TOKEN": (fp8_rows, "FP8_DYNAMIC"),
}


def write(
    out: Path, stores: dict[str, Store], told: dict[str, Any], architecture: str | None = None
) -> dict[str, Tensor]:
    """Writes the demo model into ``out``; returns what its linears stand for.

    ``stores``: by a part of the names of linears.
    """
    demo = find_model("qplug:demo")
    shutil.copytree(demo, out)
    tensors: dict[str, Tensor] = {}
    floats = {}
    for name, value in load_file(demo / "model.safetensors").items():
        module = name.removesuffix(".weight")
        store = next((each for part, each in stores.items() if part in module), None)
        if store is None:
            tensors[name] = value
            continue
        stored, floats[module] = store(value.float())
        tensors |= {f"{module}.{local}": part.contiguous() for local, part in stored.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    if architecture is not None:
        config["architectures"] = [architecture]
    told = {"quant_method": "modelopt", "producer": {"name": "modelopt"}, **told}
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return floats


def mixture(out: Path, attention: str, mlp: str, stores: dict[str, Store], **more: Any) -> Any:
    """Writes a mixed folder with an entry for each linear and each merged matrix."""
    entries = {
        f"model.layers.{block}.{name}": {"quant_algo": mlp if "mlp" in name else attention}
        for block in range(4)
        for name in (
            *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "o", "qkv")),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down", "gate_up")),
        )
    }
    told = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "ignore": ["lm_head"]}
    return write(out, stores, {**told, "quantized_layers": entries}, **more)


def read_alike(folder: Path, floats: dict[str, Tensor], *, backend: str | None = "sglang") -> None:
    """Both the exporter and the reader of checkpoints read ``floats``, to the bit."""
    source = open_checkpoint(folder, readers=Registry.installed().sources)
    opened = open_folder(str(folder), Session.alone(), backend=backend)
    assert opened.schemes.keys() == floats.keys()
    for name, weight in floats.items():
        assert torch.equal(opened.dequantized(name), weight), name
        stored = source.read(f"{name}.weight")
        assert torch.equal(stored, weight.to(stored.dtype)), name


@pytest.mark.parametrize("algorithm", STORES)
def test_a_member_of_a_mixture(tmp_path: Path, algorithm: str) -> None:
    store, scheme, releases = STORES[algorithm]
    other = "NVFP4" if algorithm == "W4A16_NVFP4" else "W4A16_NVFP4"
    out, stores = tmp_path / "out", {"self_attn": store, "mlp": STORES[other][0]}
    floats = mixture(out, algorithm, other, stores, architecture="DeciLMForCausalLM")
    read_alike(out, floats)
    found = open_folder(str(out), Session.alone(), backend="sglang").schemes
    assert {s.name for name, s in found.items() if "self_attn" in name} == {scheme}
    for version in ("0.5.16", "0.5.23"):
        verdict = qplug.verify(str(out), backend="sglang", engine_version=version)
        said = {(p.check, "self_attn" in p.where) for p in verdict.problems}
        assert said == (set() if version in releases else {("format", True)}), verdict.problems


@pytest.mark.parametrize("algorithm", IN_VLLM)
def test_tensors_that_vllm_alone_loads(tmp_path: Path, algorithm: str) -> None:
    store, scheme = IN_VLLM[algorithm]
    out, stores = tmp_path / "out", {"self_attn": store, "mlp": STORES["NVFP4"][0]}
    floats = mixture(out, algorithm, "NVFP4", stores, architecture="DeciLMForCausalLM")
    read_alike(out, floats)
    found = open_folder(str(out), Session.alone(), backend="sglang").schemes
    assert {s.name for name, s in found.items() if "self_attn" in name} == {scheme}
    problems = qplug.verify(str(out), backend="sglang").problems
    assert {p.where for p in problems} == {name for name in floats if "self_attn" in name}
    assert {p.check for p in problems} <= {"missing", "unexpected", "shape", "format"}


@pytest.mark.parametrize("algorithm", ["FP8_PB_WO", "MXFP8"])
def test_scales_that_sglang_calls_otherwise_for_llama(tmp_path: Path, algorithm: str) -> None:
    stores = {"self_attn": STORES[algorithm][0], "mlp": STORES["NVFP4"][0]}
    mixture(tmp_path / "out", algorithm, "NVFP4", stores)
    problems = qplug.verify(str(tmp_path / "out"), backend="sglang").problems
    assert {p.message for p in problems} == {
        "SGLang 0.5.23 looks for the weight_scale_inv of LlamaForCausalLM by another name"
    }


def test_an_old_scale_of_inputs_that_stay_float_is_not_used(tmp_path: Path) -> None:
    told = {"quant_algo": "W4A16_NVFP4", "group_size": 16, "ignore": ["lm_head"]}
    floats = write(tmp_path / "out", {"_proj": STORES["NVFP4"][0]}, told)
    source = open_checkpoint(tmp_path / "out", readers=Registry.installed().sources)
    name = "model.layers.0.mlp.up_proj"
    assert source.tensors[f"{name}.weight"].scheme == qplug.preset("NVFP4A16")  # type: ignore[attr-defined]
    stored = source.read(f"{name}.weight")
    assert torch.equal(stored, floats[name].to(stored.dtype))


#: ``quantization_config`` as NVIDIA publishes it, in config.json and in a file of its own.
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "NVFP4, in groups": {"quant_algo": "NVFP4", "config_groups": {"group_0": GROUP}},
    "NVFP4": {"quant_algo": "NVFP4", "group_size": 16},
    "FP8": {"quant_algo": "FP8"},
}


@pytest.mark.parametrize("version", ["0.5.16", "0.5.23"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_folders_as_nvidia_publishes_them(tmp_path: Path, name: str, version: str) -> None:
    """Scales are scalars, the size of groups is in a group, scales of a cache are in ``k_proj``."""
    told = PUBLISHED[name]
    store = STORES[told["quant_algo"]][0]

    def with_cache(weight: Tensor, local: str) -> tuple[dict[str, Tensor], Tensor]:
        stored, floats = store(weight)
        return {**stored, local: torch.tensor(1.5)}, floats

    stores: dict[str, Store] = {
        "k_proj": partial(with_cache, local="k_scale"),
        "v_proj": partial(with_cache, local="v_scale"),
        "_proj": store,
    }
    told = {**told, "kv_cache_scheme": CACHE, "ignore": ["lm_head"]}
    floats = write(tmp_path / "out", stores, told)
    verdict = qplug.verify(str(tmp_path / "out"), backend="sglang", engine_version=version)
    assert verdict.problems == ()
    read_alike(tmp_path / "out", floats)
    opened = open_folder(str(tmp_path / "out"), Session.alone(), backend="sglang")
    assert opened.kv_cache == qplug.preset("FP8").activations
    assert [[s.item() for s in pair] for pair in opened.cache_scales().values()] == [[1.5, 1.5]] * 4


@torch.no_grad()
def test_a_published_folder_is_measured_with_rounded_inputs(tmp_path: Path) -> None:
    told = {"quant_algo": "FP8", "ignore": ["lm_head"]}
    floats = write(tmp_path / "out", {"_proj": fp8}, told)
    name, tokens = "model.layers.0.self_attn.q_proj", torch.arange(3, 40).unsqueeze(0)
    assert qplug.verify(str(tmp_path / "out")).backend == "sglang"
    read_alike(tmp_path / "out", floats, backend=None)
    seen: list[Tensor] = []
    for rounds in (True, False):
        model = qplug.load(str(tmp_path / "out"), quantize_activations=rounds)
        linear = model.get_submodule(name)
        linear.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        model(tokens)
    rounded, exact = seen
    wanted = (exact / 0.013).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.013
    assert torch.equal(rounded, wanted)
    assert not torch.equal(rounded, exact)


def test_a_file_of_modelopts_own(tmp_path: Path) -> None:
    told = {"quant_algo": "FP8", "exclude_modules": ["lm_head"], "kv_cache_quant_algo": None}
    out = tmp_path / "out"
    floats = write(out, {"_proj": fp8}, told)
    config = json.loads((out / "config.json").read_text())
    own = config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))
    nested = {"producer": own["producer"], "quantization": told}
    (out / "hf_quant_config.json").write_text(json.dumps(nested))
    assert qplug.verify(str(out), backend="sglang").problems == ()
    read_alike(out, floats)


@pytest.mark.parametrize("scalar", [True, False])
def test_a_scalar_is_one_number_in_compressed_tensors_too(tmp_path: Path, scalar: bool) -> None:
    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored, floats = fp8(weight)
        shape = () if scalar else (1,)
        return {n: t if t.numel() > 1 else t.reshape(shape) for n, t in stored.items()}, floats

    args = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    group = {"targets": ["Linear"], "weights": args, "input_activations": args}
    told = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    floats = write(tmp_path / "out", {"_proj": store}, told)
    for backend in ("vllm", "sglang"):
        assert qplug.verify(str(tmp_path / "out"), backend=backend).problems == ()
    read_alike(tmp_path / "out", floats, backend=None)


# --- what qplug writes ----------------------------------------------------------------------------


def test_nvfp4a16_for_an_sglang_that_has_it_in_modelopt_alone(
    quantized: Callable[..., Path],
) -> None:
    """0.5.16 looks each layer up, and takes ``ModelOptNvFp4A16LinearMethod`` for it."""
    old = quantized("NVFP4A16", backend="sglang", backend_options={"engine": "0.5.16"})
    config = json.loads((old / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", "MIXED_PRECISION")
    entry = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        assert config["quantized_layers"][f"model.layers.3.{name}"] == entry
    for version in ("0.5.16", "0.5.23"):
        assert qplug.verify(str(old), backend="sglang", engine_version=version).problems == ()
    stored = load_file(old / "model.safetensors")
    locals_ = {name.rpartition(".")[2] for name in stored if "down_proj" in name}
    assert locals_ == {"weight", "weight_scale", "weight_scale_2"}
    new = open_folder(str(quantized("NVFP4A16", backend="sglang")), Session.alone())
    found = open_folder(str(old), Session.alone())
    for name in found.schemes:
        assert torch.equal(found.dequantized(name), new.dequantized(name)), name


def test_nvfp4a16_beside_others_for_an_old_sglang(quantized: Callable[..., Path]) -> None:
    out = quantized(
        "NVFP4A16",
        backend="sglang",
        backend_options={"engine": "0.5.16"},
        overrides={"*.self_attn.*": "FP8", "*.down_proj": "NVFP4"},
    )
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    kinds = {entry["quant_algo"] for entry in config["quantized_layers"].values()}
    assert kinds == {"FP8", "NVFP4", "W4A16_NVFP4"}
    assert qplug.verify(str(out)).problems == ()
