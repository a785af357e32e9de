"""Tiny models of text: dense decoders."""

from __future__ import annotations

from typing import Any

from zoo.tiny import Tiny

#: Rotary embeddings for each kind of layer.
BY_KIND: dict[str, Any] = {
    kind: {"rope_type": "default", "rope_theta": 10000.0}
    for kind in ("full_attention", "sliding_attention")
}
#: How experts are chosen, which the engine reads.
AFMOE: dict[str, Any] = {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}
GEMMA_3N: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": [512] * 4,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}

MODELS: dict[str, Tiny] = {
    "afmoe_dense": Tiny("AfmoeForCausalLM", {"num_dense_layers": 2}, published=AFMOE),
    "apertus": Tiny("ApertusForCausalLM"),
    "arcee": Tiny("ArceeForCausalLM"),
    "bitnet": Tiny("BitNetForCausalLM"),
    "bloom": Tiny("BloomForCausalLM"),
    "codegen": Tiny("CodeGenForCausalLM"),
    "cohere": Tiny("CohereForCausalLM"),
    "cohere2": Tiny("Cohere2ForCausalLM"),
    "cohere_compass_text": Tiny("CohereCompassForCausalLM", {"rope_parameters": BY_KIND}),
    "cwm": Tiny("CwmForCausalLM"),
    "diffllama": Tiny("DiffLlamaForCausalLM"),
    "doge": Tiny("DogeForCausalLM"),
    "ernie4_5": Tiny("Ernie4_5ForCausalLM"),
    "exaone4": Tiny("Exaone4ForCausalLM"),
    "falcon": Tiny(
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 1024},
    ),
    "falcon7b": Tiny("FalconForCausalLM", {"ffn_hidden_size": 1024}),
    "gemma": Tiny("GemmaForCausalLM"),
    "gemma2": Tiny("Gemma2ForCausalLM"),
    "gemma3_text": Tiny("Gemma3ForCausalLM"),
    "gemma3n_text": Tiny("Gemma3nForCausalLM", GEMMA_3N),
    "gemma4_text": Tiny("Gemma4ForCausalLM"),
    "gemma4_unified_text": Tiny("Gemma4UnifiedForCausalLM"),
    "glm": Tiny("GlmForCausalLM"),
    "glm4": Tiny("Glm4ForCausalLM"),
    "gpt2": Tiny("GPT2LMHeadModel"),
    "gpt_bigcode": Tiny("GPTBigCodeForCausalLM", {"num_key_value_heads": 1}),
    "gpt_neo": Tiny("GPTNeoForCausalLM"),
    "gpt_neox": Tiny("GPTNeoXForCausalLM"),
    "gptj": Tiny("GPTJForCausalLM"),
    "granite": Tiny("GraniteForCausalLM"),
    "granite_swa": Tiny("GraniteSWAForCausalLM"),
    "helium": Tiny("HeliumForCausalLM"),
    "hrm_text": Tiny("HrmTextForCausalLM"),
    "hunyuan_v1_dense": Tiny("HunYuanDenseV1ForCausalLM"),
    "hyperclovax": Tiny("HyperCLOVAXForCausalLM"),
    "jais2": Tiny("Jais2ForCausalLM"),
    "llama": Tiny("LlamaForCausalLM"),
    "llama_tied": Tiny("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama_biases": Tiny("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mellum": Tiny("MellumForCausalLM", published={"num_nextn_predict_layers": 0}),
    "minicpm3": Tiny("MiniCPM3ForCausalLM"),
    "ministral": Tiny("MinistralForCausalLM"),
    "ministral3": Tiny("Ministral3ForCausalLM"),
    "mistral": Tiny("MistralForCausalLM"),
    "mpt": Tiny("MptForCausalLM"),
    "modernbert_decoder": Tiny("ModernBertDecoderForCausalLM"),
    "nanochat": Tiny("NanoChatForCausalLM"),
    "nemotron": Tiny("NemotronForCausalLM", {"num_key_value_heads": 2}),
    "olmo": Tiny("OlmoForCausalLM"),
    "olmo2": Tiny("Olmo2ForCausalLM"),
    "olmo3": Tiny("Olmo3ForCausalLM"),
    "opt": Tiny("OPTForCausalLM"),
    "persimmon": Tiny("PersimmonForCausalLM"),
    "phi": Tiny("PhiForCausalLM"),
    "phi3": Tiny("Phi3ForCausalLM"),
    "qwen2": Tiny("Qwen2ForCausalLM"),
    "qwen3": Tiny("Qwen3ForCausalLM"),
    "seed_oss": Tiny("SeedOssForCausalLM"),
    "smollm3": Tiny("SmolLM3ForCausalLM"),
    "stablelm": Tiny("StableLmForCausalLM"),
    "starcoder2": Tiny("Starcoder2ForCausalLM"),
    "vaultgemma": Tiny("VaultGemmaForCausalLM"),
    "xglm": Tiny("XGLMForCausalLM"),
    "youtu": Tiny("YoutuForCausalLM"),
}
