"""Tiny models with experts, and with sparse or latent attention."""

from __future__ import annotations

from typing import Any

from zoo.tiny import Tiny

#: Both a dense block and one with experts.
ONE_DENSE: dict[str, Any] = {"first_k_dense_replace": 1, "num_hidden_layers": 2}

DOTS_3: dict[str, Any] = {
    "per_layer_config": {},
    "shared_experts_intermediate_size": 256,
    "head_dim": 192,
}

MODELS: dict[str, Tiny] = {
    "afmoe": Tiny("AfmoeForCausalLM", {"num_dense_layers": 1}),
    "aria_text": Tiny("AriaTextForCausalLM"),
    "axk1": Tiny("AXK1ForCausalLM"),
    "axk2": Tiny("AXK2ForCausalLM"),
    "cohere2_moe": Tiny("Cohere2MoeForCausalLM"),
    "dbrx": Tiny("DbrxForCausalLM", {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}}),
    "deepseek_v2": Tiny("DeepseekV2ForCausalLM", {"num_experts_per_tok": 2}),
    "deepseek_v3": Tiny("DeepseekV3ForCausalLM"),
    "deepseek_v32": Tiny("DeepseekV32ForCausalLM"),
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
    "glm4_moe": Tiny("Glm4MoeForCausalLM"),
    "glm4_moe_lite": Tiny("Glm4MoeLiteForCausalLM"),
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
            "moe_intermediate_size": [256, 256],
        },
    ),
    "hy_v3": Tiny("HYV3ForCausalLM"),
    "hy_v4": Tiny("HYV4ForCausalLM", {"indexer_types": ["full", "shared"]}),
    "inkling_text": Tiny("InklingForCausalLM"),
    "jetmoe": Tiny("JetMoeForCausalLM"),
    "laguna": Tiny("LagunaForCausalLM"),
    "llama4_text": Tiny("Llama4ForCausalLM"),
    "longcat_flash": Tiny("LongcatFlashForCausalLM", {"zero_expert_num": 2}),
    "mimo_v2_flash": Tiny("MiMoV2FlashForCausalLM"),
    "minimax_m2": Tiny("MiniMaxM2ForCausalLM"),
    "minimax_m3_text": Tiny("MiniMaxM3VLForCausalLM"),
    "mistral4": Tiny(
        "Mistral4ForCausalLM",
        {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_head_dim": 128, "head_dim": 128},
    ),
    "mixtral": Tiny("MixtralForCausalLM"),
    "olmoe": Tiny("OlmoeForCausalLM"),
    "phimoe": Tiny("PhimoeForCausalLM"),
    "qwen2_moe": Tiny("Qwen2MoeForCausalLM"),
    "qwen3_moe": Tiny("Qwen3MoeForCausalLM"),
    "solar_open": Tiny("SolarOpenForCausalLM"),
}
