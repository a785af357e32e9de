"""The sizes of a small DeepSeek, whose attention and experts no other family has."""

from __future__ import annotations

from typing import Any

import transformers


def small_deepseek(**sizes: Any) -> transformers.DeepseekV3Config:
    """Returns a configuration of 4 experts in 2 groups, the first block dense.

    ``sizes``: those that it shares with other families, of 4 attention heads, and
    ``moe_intermediate_size``.
    """
    return transformers.DeepseekV3Config(
        **{**sizes, "num_key_value_heads": 4, "intermediate_size": 96},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    )
