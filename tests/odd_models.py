"""Tiny checkpoints of architectures in which something stays float, or has other names on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import save
from transformers import AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MAMBA: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 2}
LATENT: dict[str, Any] = {
    **SIZES,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "moe_intermediate_size": 128,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
}
TWO_EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
HYBRID: dict[str, Any] = {
    **{key: value for key, value in SIZES.items() if key != "num_hidden_layers"},
    "head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "use_mamba_kernels": False,
}

CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    # Experts are stacked in one tensor on disk.
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, **TWO_EXPERTS, head_dim=64),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**SIZES, **TWO_EXPERTS),
    # Engines build some linears float.
    "deepseek_v32": lambda: transformers.DeepseekV32Config(**LATENT, first_k_dense_replace=1),
    "lfm2": lambda: transformers.Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    "jamba": lambda: transformers.JambaConfig(
        **SIZES,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_dt_rank=32,
        use_mamba_kernels=False,
    ),
    "mamba": lambda: transformers.MambaConfig(**MAMBA, state_size=16, time_step_rank=32),
    "hunyuan_v1_moe": lambda: transformers.HunYuanMoEV1Config(
        **SIZES, head_dim=64, num_experts=2, moe_topk=[1, 1]
    ),
    # Some linears are too narrow for kernels.
    "qwen3_5_text": lambda: transformers.Qwen3_5TextConfig(
        **SIZES,
        head_dim=64,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=16,
        linear_num_key_heads=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    # Names in memory are not those on disk.
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**SIZES, head_dim=64, sliding_window=8),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **HYBRID, layers_block_type=["mamba", "attention", "mlp"]
    ),
    "hy_v3": lambda: transformers.HYV3Config(
        **SIZES,
        head_dim=64,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=128,
        mlp_layer_types=["dense", "sparse"],
    ),
}

OddModel = Callable[[str], Path]


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> OddModel:
    """``odd_model("gpt_oss")``: a folder with a random model, to read, not to change."""
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]()).bfloat16()
            made[name] = save(model, tmp_path_factory.mktemp("odd") / name)
        return made[name]

    return write
