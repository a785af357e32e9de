"""The sizes of tiny models: what a field of a configuration becomes, by its name.

Kernels take the sizes as they take real models' sizes: heads are 64 wide or more, every linear has
multiples of 64 rows and of 128 columns, latent attention has DeepSeek's ranks.
"""

from __future__ import annotations

from typing import Any

#: Tokens of the tokenizer of the demo model, which every tiny model has.
VOCABULARY = 4096
#: Rows of the embeddings of a model that has tokens for pictures or sound, after the tokenizer's.
WITH_MARKS = VOCABULARY + 128

HIDDEN = 256

#: The text part.
TEXT: dict[str, Any] = {
    # widths
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "model_dim", "word_embed_proj_dim"), HIDDEN
    ),
    **dict.fromkeys(("embedding_size", "decoder_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 512),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "mlp_hidden_size"), 512),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size"), 512),
    "block_ff_dim": 512,
    "block_dim": HIDDEN,
    "conv_dim": HIDDEN,
    "conv_dim_out": HIDDEN,
    # attention
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels"), 64),
    "global_head_dim": 128,
    "rotary_dim": 32,
    "num_global_key_value_heads": 1,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 64,
    "swa_v_head_dim": 64,
    "query_pre_attn_scalar": 64,
    # latent attention
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "qk_head_dim": 192,
    "v_head_dim": 128,
    "o_lora_rank": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 64,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("top_k_experts", "moe_top_k", "num_experts_per_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    "moe_num_shared_experts": 1,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 384),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 384),
    "moe_latent_size": None,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "decoder_sparse_step": 1,
    # linear attention and state spaces
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 16,
    "mamba_n_heads": 32,
    "mamba_d_head": 16,
    "mamba_d_ssm": 512,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "n_mamba_heads": 32,
    "mamba_headdim": 16,
    "mamba_ngroups": 1,
    "mamba_expand": 2,
    "mamba_dt_rank": 128,
    "time_step_rank": 128,
    "use_mamba_kernels": False,
    # embeddings, positions and layers
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 256,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_seq_len": 512,
    "sliding_window": 32,
    "attention_chunk_size": 128,
    "type_vocab_size": 1,
}

#: Towers of pictures, films and sound.
TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "hidden_dim", "width"), 128),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "mlp_dim"), 256),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("attention_heads", "num_key_value_heads"), 2),
    "head_dim": 64,
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "num_layers", "layers"), 2),
    **dict.fromkeys(("out_hidden_size", "output_dim", "vision_output_dim"), HIDDEN),
    "image_size": 56,
    "patch_size": 14,
    "num_mel_bins": 128,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "max_source_positions": 100,
}

#: How a sub-configuration that is a tower is called.
TOWERS = ("vision", "visual", "audio", "image", "vit", "speech", "encoder_config")
