"""Small checkpoints to quantize, and what lies in a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    WriteLlama = Callable[..., Path]


@pytest.fixture(scope="session")
def write_llama() -> WriteLlama:
    """Writes a random Llama checkpoint: ``write_llama(folder, shards=2, hidden_size=128)``."""

    def write(folder: Path, *, shards: int = 1, dtype: str = "bfloat16", **changes: Any) -> Path:
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": dtype,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "vocab_size": 64,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            **changes,
        }
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        _write_shards(folder, _random_tensors(config, getattr(torch, dtype)), shards)
        return folder

    return write


def _random_tensors(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.self_attn.q_proj.weight": (queries, hidden),
            f"{block}.self_attn.k_proj.weight": (keys, hidden),
            f"{block}.self_attn.v_proj.weight": (keys, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, queries),
            f"{block}.post_attention_layernorm.weight": (hidden,),
            f"{block}.mlp.gate_proj.weight": (inner, hidden),
            f"{block}.mlp.up_proj.weight": (inner, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        for name, shape in shapes.items()
    }


def _write_shards(folder: Path, tensors: dict[str, Tensor], count: int) -> None:
    if count == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(tensors)
    places = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number * len(names) // count : (number + 1) * len(names) // count]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def pristine_llama(tmp_path_factory: pytest.TempPathFactory, write_llama: WriteLlama) -> Path:
    """A checkpoint in two shards; ``llama`` is a copy of it that a test may change."""
    return write_llama(tmp_path_factory.mktemp("pristine") / "llama", shards=2)


@pytest.fixture
def llama(tmp_path: Path, pristine_llama: Path) -> Path:
    """A small checkpoint in two shards at ``tmp_path / "llama"``."""
    return Path(shutil.copytree(pristine_llama, tmp_path / "llama"))


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes | None]]:
    """Gives all that lies under a folder, by path: the bytes of files, None for folders."""

    def read(folder: Path) -> dict[str, bytes | None]:
        return {
            str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))
        }

    return read
