"""Tiny models with state spaces, linear attention or convolutions between attention."""

from __future__ import annotations

from typing import Any

from zoo.tiny import Tiny

BOTH_KINDS = ["linear_attention", "full_attention"]
LFM_2: dict[str, Any] = {
    "layer_types": ["conv", "full_attention"],
    "num_hidden_layers": 2,
    "block_auto_adjust_ff_dim": False,
    "conv_dim": 256,  # the engine reads it, as files on the Hub have it,
}
LFM_2_SIZES: dict[str, Any] = {"block_dim": 256, "block_ff_dim": 512}  # and these
JAMBA: dict[str, Any] = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
#: The indexer and the hyper-connections, which have no sizes by default.
QWEN_4: dict[str, Any] = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 64,
    "ngram_vocab_size_base": 1000,
    "ple_embed_dim": 256,
}

MODELS: dict[str, Tiny] = {
    "bailing_hybrid": Tiny("BailingHybridForCausalLM"),
    "bamba": Tiny("BambaForCausalLM", {"attn_layer_indices": [1]}),
    "falcon_h1": Tiny("FalconH1ForCausalLM"),
    "falcon_mamba": Tiny("FalconMambaForCausalLM", {"state_size": 32}),
    "granitemoehybrid": Tiny("GraniteMoeHybridForCausalLM", {"layer_types": BOTH_KINDS}),
    "granitemoehybrid_dense": Tiny(
        "GraniteMoeHybridForCausalLM", {"num_local_experts": 0, "layer_types": BOTH_KINDS}
    ),
    "jamba": Tiny("JambaForCausalLM", JAMBA),
    "kimi_linear": Tiny("KimiLinearForCausalLM", {"linear_num_heads": 4}),
    "lfm2": Tiny("Lfm2ForCausalLM", LFM_2, published=LFM_2_SIZES),
    "lfm2_moe": Tiny(
        "Lfm2MoeForCausalLM",
        {
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_hidden_layers": 4,
        },
    ),
    "lfm3": Tiny("Lfm3ForCausalLM"),
    "mamba": Tiny("MambaForCausalLM", {"state_size": 32}),
    "mamba2": Tiny(
        "Mamba2ForCausalLM", {"num_heads": 32, "head_dim": 16, "state_size": 16, "n_groups": 1}
    ),
    "minimax": Tiny("MiniMaxForCausalLM"),
    "nemotron_h": Tiny(
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3},
    ),
    "nemotron_h_moe": Tiny(
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3},
    ),
    "olmo_hybrid": Tiny("OlmoHybridForCausalLM"),
    "qwen3_5_moe_text": Tiny("Qwen3_5MoeForCausalLM"),
    "qwen3_5_text": Tiny("Qwen3_5ForCausalLM"),
    "qwen3_5_text_16heads": Tiny("Qwen3_5ForCausalLM", {"linear_num_value_heads": 16}),
    "qwen3_next": Tiny("Qwen3NextForCausalLM"),
    "qwen4_exp_text": Tiny("Qwen4ExpForCausalLM", QWEN_4),
    "recurrent_gemma": Tiny("RecurrentGemmaForCausalLM", {"num_hidden_layers": 3}),
    "zamba": Tiny(
        "ZambaForCausalLM",
        {
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "num_hidden_layers": 4,
            "attention_hidden_size": 512,
            "attention_head_dim": 128,
        },
    ),
    "zamba2": Tiny("Zamba2ForCausalLM"),
    "zaya": Tiny("ZayaForCausalLM", {"num_experts_per_tok": 1}),
}
