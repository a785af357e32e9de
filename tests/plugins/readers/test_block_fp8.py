"""A tiny DeepSeek-V3 in blocks of fp8, made here, read as the float model it means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import qplug
from qplug import QplugError
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.reading.load import load
from qplug.registry.registry import Registry

Cli = Callable[..., Result]
BLOCK = 128
READERS = Registry.installed().sources


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the product of both, written out block by block."""
    out, width = weight.shape
    padded = pad(weight.float(), (0, -width % BLOCK, 0, -out % BLOCK))
    tiles = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    product = (codes.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1)
    codes = codes.flatten(2).flatten(0, 1)[:out, :width].contiguous()
    return codes, scales, product[:out, :width].bfloat16()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoint in fp8, and the same numbers in bfloat16. Sides are no multiples of 128."""
    root = tmp_path_factory.mktemp("deepseek")
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=320,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=64,
        q_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=128,
    )
    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "float")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / file, root / "float")
    shutil.copytree(root / "float", root / "fp8")
    fp8, floats = {}, {}
    for name, weight in load_file(root / "float" / "model.safetensors").items():
        quantized = "_proj" in name and weight.ndim == 2
        if quantized:
            fp8[name], fp8[name + "_scale_inv"], floats[name] = quantize(weight)
        else:
            fp8[name] = floats[name] = weight
    assert sum(name.endswith("_scale_inv") for name in fp8) > 20
    save_file(floats, root / "float" / "model.safetensors", {"format": "pt"})
    save_file(fp8, root / "fp8" / "model.safetensors", {"format": "pt"})
    told = json.loads((root / "fp8" / "config.json").read_text())
    told["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (root / "fp8" / "config.json").write_text(json.dumps(told))
    return root / "fp8", root / "float"


def test_every_tensor_reads_as_the_float_one(folders: tuple[Path, Path]) -> None:
    fp8, floats = (open_checkpoint(folder, readers=READERS) for folder in folders)
    assert {n: t.spec for n, t in fp8.tensors.items()} == {
        n: t.spec for n, t in floats.tensors.items()
    }
    assert "quantization_config" not in fp8.config
    for name in floats.tensors:
        assert torch.equal(fp8.read(name), floats.read(name)), name
        whole = b"".join(fp8.tensors[name].chunks())
        assert whole == b"".join(floats.tensors[name].chunks()), name


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_quantized_it_is_what_the_float_one_gives(
    folders: tuple[Path, Path], tmp_path: Path, scheme: str
) -> None:
    outs = []
    for folder in folders:
        size = {"group_size": 32} if scheme == "W4A16" else {}
        out = tmp_path / folder.name
        qplug.quantize(
            str(folder), out, scheme=scheme, backend="compressed-tensors", device="cpu", **size
        )
        outs.append(out)
    one, other = ((out / "model.safetensors").read_bytes() for out in outs)
    assert one == other
    config = json.loads((outs[0] / "config.json").read_text())
    assert config == json.loads((outs[1] / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_it_computes_and_is_measured(folders: tuple[Path, Path], cli: Cli) -> None:
    tokens = torch.arange(5, 37)[None]
    with torch.no_grad():
        one, other = (load(str(folder))(input_ids=tokens).logits for folder in folders)
    assert torch.equal(one, other)
    result = cli("eval", folders[0], "--windows", 2, "--seq-len", 64, "--device", "cpu")
    assert result.exit_code == 0, result.output


def test_an_llmc_file_for_it_runs(folders: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "dsv3.yml"
    file.write_text(
        f"""
base:
    seed: &seed 42
model:
    type: DeepseekV3
    path: {folders[0]}
    tokenizer_mode: fast
    torch_dtype: torch.float8_e4m3fn
quant:
    method: RTN
    weight:
        bit: 4
        symmetric: True
        granularity: per_group
        group_size: 32
        need_pack: True
save:
    save_vllm: True
    save_path: {tmp_path / "out"}
"""
    )
    result = cli("quantize", "--config", file, "--backend", "compressed-tensors")
    assert result.exit_code == 0, result.output
    checked = cli("verify", tmp_path / "out")
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize("broken", ["lost", "shape"])
def test_scales_that_do_not_fit(folders: tuple[Path, Path], tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "fp8"
    shutil.copytree(folders[0], folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    if broken == "lost":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, folder / "model.safetensors")
    match = {"lost": f"is fp8, and has no {name}", "shape": r"is \[1, 2\], which does not fit"}
    with pytest.raises(QplugError, match=match[broken]):
        open_checkpoint(folder, readers=READERS)
