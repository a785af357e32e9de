"""Models as they are published, quantized: the folder is the one that the float model gives."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import save
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV4Config, GptOssConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

import qplug

Tensors = dict[str, Tensor]

pytestmark = pytest.mark.slow


def gpt_oss(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The experts in MXFP4, and the tensors that transformers makes of them."""
    stored, floats = {}, {}
    for name, value in tensors.items():
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            stored[name] = floats[name] = value
            continue
        experts, width, rows = value.shape
        blocks = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8)
        scales = torch.randint(116, 120, (experts, rows, width // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = _convert_moe_packed_tensors(blocks, scales)
    return stored, floats


def deepseek_v4(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Experts in fp4, and some other matrices in blocks of fp8."""
    stored, floats = {}, {}
    for name, value in tensors.items():
        scale = f"{name.removesuffix('weight')}scale"
        if re.search(r"\.experts\.\d+\.w\d\.weight$", name):
            out, width = value.shape
            stored[name] = torch.randint(-128, 128, (out, width // 2), dtype=torch.int8)
            shape = (out, width // 32)
        elif re.search(r"(wq_a|wq_b|wkv|wo_b)\.weight$", name) and "compressor" not in name:
            stored[name] = (value.float() * 100).to(torch.float8_e4m3fn)
            shape = (-(-value.shape[0] // 64), -(-value.shape[1] // 64))
        else:
            stored[name] = floats[name] = value
            continue
        powers = torch.randint(116, 120, shape, dtype=torch.uint8)
        stored[scale] = powers.view(torch.float8_e8m0fnu)
        floats[name] = Fp8Dequantize(None)._dequantize_one(
            stored[name], stored[scale], torch.bfloat16
        )
    return stored, floats


SIZES = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "head_dim": 64,
}
CONFIGS = {
    "gpt_oss": lambda: GptOssConfig(
        **SIZES, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2
    ),
    "deepseek_v4": lambda: DeepseekV4Config(
        **SIZES,
        num_attention_heads=4,
        moe_intermediate_size=128,
        n_routed_experts=2,
        q_lora_rank=128,
        o_lora_rank=128,
        o_groups=2,
        index_n_heads=64,
        index_head_dim=128,
        n_shared_experts=1,
        qk_rope_head_dim=32,
    ),
}
#: The backend and the scheme in which a model is quantized again.
BACKENDS = {
    "gpt_oss": ("gpt-oss", "MXFP4A16"),
    "deepseek_v4": ("compressed-tensors", "FP8_DYNAMIC"),
}
#: ``quantization_config``, other fields of config.json, and how tensors are stored, by model.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Tensors], Any]]] = {
    "gpt_oss": ({"quant_method": "mxfp4"}, {}, gpt_oss),
    "deepseek_v4": (
        {
            "quant_method": "fp8",
            "weight_block_size": [64, 64],
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
        },
        {"expert_dtype": "fp4"},
        deepseek_v4,
    ),
}


@pytest.fixture(params=list(PUBLISHED))
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """A model as it is published, and the same numbers in bfloat16."""
    told, more, store = PUBLISHED[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]()).bfloat16()
    source, made = save(model, tmp_path / "source"), []
    stored, floats = store(load_file(source / "model.safetensors"))
    for name, tensors in (("published", stored), ("float", floats)):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        if name == "published":
            config |= {"quantization_config": told, **more}
        (folder / "config.json").write_text(json.dumps(config))
        made.append(folder)
    return made


def test_the_folder_is_the_one_that_the_float_model_gives(
    folders: list[Path], tmp_path: Path
) -> None:
    outs = [tmp_path / f"{folder.name}-out" for folder in folders]
    for folder, out in zip(folders, outs, strict=True):
        is_oss = "GptOss" in (folder / "config.json").read_text()
        backend, scheme = BACKENDS["gpt_oss" if is_oss else "deepseek_v4"]
        qplug.quantize(str(folder), out, scheme=scheme, backend=backend)
        assert qplug.verify(str(out)).ok
    one, other = (load_file(out / "model.safetensors") for out in outs)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)), name
