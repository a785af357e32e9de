"""Published models as far as a plan sees them: config.json, and names and shapes of tensors.

The figures of config.json are those of the models' cards on the Hub. No weight is there: files have
holes where the weights would be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qplug import TensorSpec
from qplug.checkpoint.tensor_file import lay_out

Specs = Iterator[tuple[str, TensorSpec]]


@dataclass(frozen=True)
class Published:
    """A model: ``config`` is its config.json, ``specs`` makes the tensors by name."""

    config: dict[str, Any]
    specs: Callable[[], Specs]

    def write(self, folder: Path) -> Path:
        """Writes the model into ``folder``, which is made, and returns ``folder``."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        path = folder / "model.safetensors"
        header, tensors = lay_out(path, dict(self.specs()))
        with path.open("wb") as file:
            file.write(header)
            file.truncate(max(t.start + t.nbytes for t in tensors.values()))
        return folder


def _bf16(name: str, *shape: int) -> tuple[str, TensorSpec]:
    return f"{name}.weight", TensorSpec("bfloat16", shape)


def _attention(block: str, hidden: int, heads: int, kv: int, size: int) -> Specs:
    yield _bf16(f"{block}.self_attn.q_proj", heads * size, hidden)
    yield _bf16(f"{block}.self_attn.k_proj", kv * size, hidden)
    yield _bf16(f"{block}.self_attn.v_proj", kv * size, hidden)
    yield _bf16(f"{block}.self_attn.o_proj", hidden, heads * size)
    yield _bf16(f"{block}.input_layernorm", hidden)
    yield _bf16(f"{block}.post_attention_layernorm", hidden)


def _mlp(module: str, hidden: int, width: int) -> Specs:
    yield _bf16(f"{module}.gate_proj", width, hidden)
    yield _bf16(f"{module}.up_proj", width, hidden)
    yield _bf16(f"{module}.down_proj", hidden, width)


def _ends(vocabulary: int, hidden: int) -> Specs:
    yield _bf16("model.embed_tokens", vocabulary, hidden)
    yield _bf16("model.norm", hidden)
    yield _bf16("lm_head", vocabulary, hidden)


def _llama(layers: int, hidden: int, heads: int, width: int) -> Specs:
    yield from _ends(128256, hidden)
    for number in range(layers):
        block = f"model.layers.{number}"
        yield from _attention(block, hidden, heads, 8, 128)
        yield from _mlp(f"{block}.mlp", hidden, width)


def _llama_config(layers: int, hidden: int, heads: int, width: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }


LLAMA_3_8B = Published(_llama_config(32, 4096, 32, 14336), lambda: _llama(32, 4096, 32, 14336))
LLAMA_3_70B = Published(_llama_config(80, 8192, 64, 28672), lambda: _llama(80, 8192, 64, 28672))


def _qwen3_30b() -> Specs:
    yield from _ends(151936, 2048)
    for number in range(48):
        block = f"model.layers.{number}"
        yield from _attention(block, 2048, 32, 4, 128)
        yield _bf16(f"{block}.self_attn.q_norm", 128)
        yield _bf16(f"{block}.self_attn.k_norm", 128)
        yield _bf16(f"{block}.mlp.gate", 128, 2048)
        for expert in range(128):
            yield from _mlp(f"{block}.mlp.experts.{expert}", 2048, 768)


QWEN3_30B_A3B = Published(
    {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    _qwen3_30b,
)


def _fp8(name: str, out: int, width: int) -> Specs:
    yield f"{name}.weight", TensorSpec("float8_e4m3fn", (out, width))
    blocks = (-(-out // 128), -(-width // 128))
    yield f"{name}.weight_scale_inv", TensorSpec("float32", blocks)


def _fp8_mlp(module: str, width: int) -> Specs:
    yield from _fp8(f"{module}.gate_proj", width, 7168)
    yield from _fp8(f"{module}.up_proj", width, 7168)
    yield from _fp8(f"{module}.down_proj", 7168, width)


def _deepseek_v3() -> Specs:
    """The model without its draft layer."""
    yield from _ends(129280, 7168)
    for number in range(61):
        block = f"model.layers.{number}"
        attention = f"{block}.self_attn"
        yield from _fp8(f"{attention}.q_a_proj", 1536, 7168)
        yield from _fp8(f"{attention}.q_b_proj", 128 * 192, 1536)
        yield from _fp8(f"{attention}.kv_a_proj_with_mqa", 512 + 64, 7168)
        yield from _fp8(f"{attention}.kv_b_proj", 128 * 256, 512)
        yield from _fp8(f"{attention}.o_proj", 7168, 128 * 128)
        yield _bf16(f"{attention}.q_a_layernorm", 1536)
        yield _bf16(f"{attention}.kv_a_layernorm", 512)
        yield _bf16(f"{block}.input_layernorm", 7168)
        yield _bf16(f"{block}.post_attention_layernorm", 7168)
        if number < 3:
            yield from _fp8_mlp(f"{block}.mlp", 18432)
            continue
        yield _bf16(f"{block}.mlp.gate", 256, 7168)
        yield f"{block}.mlp.gate.e_score_correction_bias", TensorSpec("float32", (256,))
        yield from _fp8_mlp(f"{block}.mlp.shared_experts", 2048)
        for expert in range(256):
            yield from _fp8_mlp(f"{block}.mlp.experts.{expert}", 2048)


DEEPSEEK_V3 = Published(
    {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    },
    _deepseek_v3,
)
