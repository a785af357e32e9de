"""Tiny models with experts, and with sparse or latent attention."""

from __future__ import annotations

from typing import Any

from zoo.text import AFMOE
from zoo.tiny import Tiny

#: Both a dense block and one with experts.
ONE_DENSE: dict[str, Any] = {"first_k_dense_replace": 1, "num_hidden_layers": 2}

#: How experts are chosen since DeepSeek V3, which engines read.
NO_AUX: dict[str, Any] = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}
MIMO_V2: dict[str, Any] = {
    **NO_AUX,
    "hybrid_layer_pattern": [1, 0],
    "moe_layer_freq": [0, 1],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 64,
    "swa_v_head_dim": 128,
    "layernorm_epsilon": 1e-6,
    "partial_rotary_factor": 0.334,
    "rope_theta": 5000000.0,
    "swa_rope_theta": 10000.0,
    "sliding_window_size": 32,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "attention_value_scale": 0.707,
}

DOTS_3: dict[str, Any] = {
    "per_layer_config": {},
    "shared_experts_intermediate_size": 256,
    "head_dim": 192,
}

MODELS: dict[str, Tiny] = {
    "afmoe": Tiny("AfmoeForCausalLM", {"num_dense_layers": 1}, published=AFMOE),
    "aria_text": Tiny("AriaTextForCausalLM"),
    "axk1": Tiny("AXK1ForCausalLM"),
    "axk2": Tiny("AXK2ForCausalLM"),
    "cohere2_moe": Tiny("Cohere2MoeForCausalLM"),
    "dbrx": Tiny("DbrxForCausalLM", {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}}),
    "deepseek_v2": Tiny(
        "DeepseekV2ForCausalLM",
        {"num_experts_per_tok": 2},
        published={"n_group": 1, "topk_group": 1, "moe_layer_freq": 1},
    ),
    "deepseek_v3": Tiny("DeepseekV3ForCausalLM", published=NO_AUX),
    "deepseek_v32": Tiny("DeepseekV32ForCausalLM", published=NO_AUX),
    "deepseek_v4": Tiny("DeepseekV4ForCausalLM"),
    "dots1": Tiny(
        "Dots1ForCausalLM",
        {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "dots3_note": Tiny("Dots3NoteForCausalLM", DOTS_3),
    "ernie4_5_moe": Tiny("Ernie4_5_MoeForCausalLM"),
    "exaone_moe": Tiny("ExaoneMoeForCausalLM"),
    "flex_olmo": Tiny("FlexOlmoForCausalLM"),
    "gemma4_text_moe": Tiny(
        "Gemma4ForCausalLM",
        {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 384,
        },
    ),
    "glm4_moe": Tiny("Glm4MoeForCausalLM", published={"head_dim": 64}),
    "glm4_moe_lite": Tiny(
        "Glm4MoeLiteForCausalLM", published={**NO_AUX, "first_k_dense_replace": 1}
    ),
    "glm_moe_dsa": Tiny("GlmMoeDsaForCausalLM"),
    "gpt_oss": Tiny("GptOssForCausalLM"),
    "granitemoe": Tiny("GraniteMoeForCausalLM"),
    "granitemoe_swa": Tiny("GraniteMoeSWAForCausalLM"),
    "granitemoeshared": Tiny("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Tiny(
        "HunYuanMoEV1ForCausalLM",
        {
            "moe_topk": [2, 2],
            "num_shared_expert": [1, 1],
            "moe_intermediate_size": [512, 512],
        },
    ),
    "hy_v3": Tiny(
        "HYV3ForCausalLM",
        published={
            "first_k_dense_replace": 1,
            "expert_hidden_dim": 384,
            "route_norm": True,
            "qk_norm": True,
        },
    ),
    "hy_v4": Tiny("HYV4ForCausalLM", {"indexer_types": ["full", "shared"]}),
    "inkling_text": Tiny("InklingForCausalLM"),
    "jetmoe": Tiny("JetMoeForCausalLM"),
    "laguna": Tiny("LagunaForCausalLM", {"num_attention_heads_per_layer": [4, 4]}),
    "llama4_text": Tiny("Llama4ForCausalLM", {"num_experts_per_tok": 1}),
    "longcat_flash": Tiny(
        "LongcatFlashForCausalLM",
        {"zero_expert_num": 2},
        published={
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "zero_expert_type": "identity",
        },
    ),
    "mimo_v2_flash": Tiny("MiMoV2FlashForCausalLM", published=MIMO_V2),
    "minimax_m2": Tiny(
        "MiniMaxM2ForCausalLM",
        published={"rotary_dim": 64, "scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    "minimax_m3_text": Tiny("MiniMaxM3VLForCausalLM"),
    "mistral4": Tiny(
        "Mistral4ForCausalLM",
        {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_head_dim": 128, "head_dim": 128},
    ),
    "mixtral": Tiny("MixtralForCausalLM"),
    "olmoe": Tiny("OlmoeForCausalLM"),
    "phimoe": Tiny("PhimoeForCausalLM", published={"architectures": ["PhiMoEForCausalLM"]}),
    "qwen2_moe": Tiny("Qwen2MoeForCausalLM"),
    "qwen3_moe": Tiny("Qwen3MoeForCausalLM"),
    "solar_open": Tiny("SolarOpenForCausalLM"),
}
