"""Sound folders and files of every kind that qplug reads, small, for a fuzzer to change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
NATIVE = """\
pipeline: [awq]
scheme: W4A16
backend: sglang
ignore: [lm_head]
seed: 3
calibration: {dataset: text, options: {path: TEXT}, samples: 2, seq_len: 16}
export:
- out: OUT
eval:
- at: [quantized]
  seq_len: 16
  windows: 1
"""
LLMC = """\
base:
    seed: &seed 42
model:
    type: Llama
    path: MODEL
    torch_dtype: auto
calib:
    name: pileval
    download: False
    n_samples: 2
    path: TEXT
    bs: -1
    seq_len: 16
    preproc: pileval_awq
    seed: *seed
quant:
    method: Awq
    weight:
        bit: 4
        symmetric: True
        granularity: per_group
        group_size: 128
    special:
        trans: True
        trans_version: v2
        weight_clip: True
save:
    save_sgl: True
    save_path: OUT
"""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Seed:
    """Something sound to change: a ``path``, its ``kind``, and its files that may be changed.

    ``kind``: what commands fit it. A path that is a file is itself what is changed.
    """

    kind: str
    path: Path
    files: tuple[str, ...] = field(default=())


def make_seeds(root: Path, *, few: bool = False) -> list[Seed]:
    """All seeds, written below ``root``; or a ``few`` of them, of every kind."""
    text = "".join(f"The {n}th sentence of a text, with a few words in it.\n" for n in range(200))
    (root / "text.txt").write_text(text)
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(3)))
    (root / "text.json").write_text(json.dumps([text, {"text": text}]))
    (root / "recipe.yml").write_text(NATIVE)
    plain = {"pipeline": ["rtn"], "scheme": "W8A16", "export": [{"out": "OUT"}]}
    (root / "recipe.json").write_text(json.dumps(plain))
    (root / "llmc.yml").write_text(LLMC)
    return [
        *(Seed("text", root / f"text.{kind}") for kind in ("txt", "jsonl", "json")),
        *(Seed("recipe", root / name) for name in ("recipe.yml", "recipe.json", "llmc.yml")),
        *(_float(root, name, make) for name, make in list(_MODELS.items())[: 1 if few else None]),
        *(_quantized(root, name, w) for name, w in list(_FOLDERS.items())[: 2 if few else None]),
    ]


def _llama() -> Any:
    import transformers

    return transformers.LlamaConfig(**SIZES)


def _experts() -> Any:
    import transformers

    return transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128
    )


def _gpt2() -> Any:
    import transformers

    return transformers.GPT2Config(
        vocab_size=4096, n_embd=128, n_layer=2, n_head=4, n_positions=64, n_inner=256
    )


_MODELS: dict[str, Callable[[], Any]] = {"llama": _llama, "experts": _experts, "gpt2": _gpt2}
_DATA = ("--samples", "2", "--seq-len", "16")
_FOLDERS: dict[str, tuple[str, ...]] = {
    "w4a16": ("--algo", "rtn"),
    "awq": ("--algo", "awq"),
    "fp8": ("--scheme", "FP8_DYNAMIC"),
    "static": ("--scheme", "FP8"),
    "gptq": ("--backend", "gptq"),
    "nvfp4": ("--scheme", "NVFP4"),
    "cache": ("--kv-cache", "fp8", "--backend", "vllm"),
}


def _float(root: Path, name: str, make: Callable[[], Any]) -> Seed:
    from transformers import AutoModelForCausalLM

    folder = root / name
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make()).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="700KB" if name == "llama" else "1GB")
    demo = Path(__import__("qplug").__file__).parent / "demo"
    for file in TOKENIZER:
        shutil.copyfile(demo / file, folder / file)
    return Seed("float", folder, _names(folder))


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.name != "README.md"))


def _quantized(root: Path, name: str, words: tuple[str, ...]) -> Seed:
    from qplug.cli.main import main

    out = root / name
    all_words = [
        "quantize",
        str(root / "llama"),
        "--out",
        str(out),
        "--device",
        "cpu",
        *words,
        *_DATA,
    ]
    result = CliRunner().invoke(main, all_words)
    assert result.exit_code == 0, result.output
    return Seed("quantized", out, _names(out))


def other_dtype(path: Path, dtype: torch.dtype) -> None:
    """Write some tensors of the safetensors file at ``path`` in ``dtype``."""
    held = load_file(path)
    names = [name for name, tensor in held.items() if tensor.is_floating_point()]
    for name in names[1::2]:
        held[name] = held[name].float().clamp(0, 1).to(dtype)
    save_file(held, path, {"format": "pt"})
