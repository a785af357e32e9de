"""What SGLang's loader of compressed-tensors folders reads, by release: a table, without logic."""

from __future__ import annotations

from qplug_compressed_tensors.configuration import (
    FLOAT_QUANTIZED,
    INT_QUANTIZED,
    MXFP4_PACKED,
    MXFP8_QUANTIZED,
    NVFP4_PACKED,
    PACK_QUANTIZED,
)
from qplug_compressed_tensors.loader import Loader

#: The architectures for which 0.5.23 gives k_scale and v_scale of attention to its cache: their
#: load_weights calls maybe_remap_kv_scale_name (models/*.py), or maps the names itself (Qwen3.5).
#: For all others it warns, or says nothing, and the cache has scales of 1.
_CACHE_MODELS = frozenset(
    {
        *("ApertusForCausalLM", "ArceeForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM"),
        *("DbrxForCausalLM", "DeciLMForCausalLM", "Exaone4ForCausalLM", "GPTJForCausalLM"),
        *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        *("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration", "Gemma4ForCausalLM"),
        *("Gemma4ForConditionalGeneration", "HunYuanDenseV1ForCausalLM", "LlamaForCausalLM"),
        *("HunYuanMoEV1ForCausalLM", "InternLM3ForCausalLM", "Llama4ForConditionalGeneration"),
        *("Llama4ForCausalLM", "MiniMaxM2ForCausalLM", "Ministral3ForCausalLM"),
        *("MistralForCausalLM", "NemotronHForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM"),
        *("Qwen3ForCausalLM", "Qwen3_5ForConditionalGeneration", "SDARForCausalLM"),
        "Qwen3_5MoeForConditionalGeneration",
    }
)

LOADERS = {
    "SGLang 0.5.23": Loader(
        plain="end",
        classes_first=True,
        one_format_for_experts=frozenset({PACK_QUANTIZED}),
        heads=frozenset({PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED}),
        unread=frozenset({MXFP4_PACKED, MXFP8_QUANTIZED}),
        cache_models=_CACHE_MODELS,
        int8_experts=False,
        fp8_a16_experts=False,  # get_moe_scheme raises
        weights_in_bytes=False,
        embeddings=frozenset(),  # a quantized one is uninitialized memory
        source="compressed_tensors.py of 0.5.23: _get_scheme_from_parts, get_lm_head_scheme, "
        "CompressedTensorsKVCacheMethod; its experts compare the format of the folder alone "
        "(schemes/compressed_tensors_wNa16_moe.py, compressed_tensors_w4a8_fp8_moe.py)",
    ),
    "SGLang 0.5.16": Loader(
        plain="part",
        own_formats=False,
        classes_first=True,
        unread=frozenset({NVFP4_PACKED, MXFP4_PACKED, MXFP8_QUANTIZED}),
        caches=frozenset(),
        int8_experts=False,
        fp8_a16_experts=False,  # get_moe_scheme raises
        weights_in_bytes=False,
        embeddings=frozenset(),  # a quantized one is uninitialized memory
        source="compressed_tensors.py of 0.5.16, and runs on an H200: a quantized head is garbage, "
        "scales of a cache are dropped, two formats are refused",
    ),
}

#: The releases that need --fp4-gemm-backend for NVFP4 on GPUs without fp4: later ones find Marlin.
FP4_BY_OPTION = frozenset({"SGLang 0.5.16"})
