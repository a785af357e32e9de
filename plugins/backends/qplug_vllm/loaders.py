"""What vLLM's loader of compressed-tensors folders reads, by release: a table, without logic."""

from __future__ import annotations

from qplug_compressed_tensors.configuration import INT_QUANTIZED, PACK_QUANTIZED
from qplug_compressed_tensors.loader import Loader

#: The formats in which a head was run.
_HEADS = frozenset({PACK_QUANTIZED, INT_QUANTIZED})
#: Experts with one scale a row run by Marlin alone: CompressedTensorsWNA16MoEMethod asserts groups
#: for all other kernels. On sm90 Humming comes first (prioritize_humming), and Marlin has no zero
#: points of 8 bits (MarlinExpertsBase._supports_quant_scheme).
_ROW_EXPERTS = frozenset(
    (scheme, device)
    for scheme in ("W4A16", "W4A16_ASYM", "W8A16")
    for device in ("sm80", "sm89", "sm100")
)

#: Models that hand the configuration on to the embedding, without its name and with it. A head that
#: is computed with the same tensor needs ``embed_tokens.weight`` (``tie_weights``).
_UNNAMED_EMBEDDINGS = frozenset(
    {
        *("ApertusForCausalLM", "Ernie4_5ForCausalLM", "Exaone4ForCausalLM", "ExaoneForCausalLM"),
        *("Glm4ForCausalLM", "GraniteForCausalLM", "InternLM3ForCausalLM", "LlamaForCausalLM"),
        *("Ministral3ForCausalLM", "MistralForCausalLM", "OlmoeForCausalLM", "Phi3ForCausalLM"),
    }
)
_EMBEDDINGS = _UNNAMED_EMBEDDINGS | {
    *("DeepseekForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    *("Ernie4_5_MoeForCausalLM", "Gemma3ForCausalLM", "Glm4MoeLiteForCausalLM"),
    *("MiniMaxM2ForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM"),
    *("Qwen3MoeForCausalLM", "StableLmForCausalLM"),
}

LOADERS = {
    "vLLM 0.32.0": Loader(
        heads=_HEADS,
        caches=frozenset({"tensor", "attn_head"}),  # CompressedTensorsKVCacheMethod
        row_experts=_ROW_EXPERTS,
        embeddings=_EMBEDDINGS,
        unnamed_embeddings=_UNNAMED_EMBEDDINGS,
        fp8_a16_experts=False,  # CompressedTensorsMoEMethod.get_moe_method raises
        weights_in_bytes=False,  # _quantization_scheme_map_from_config asserts floats
        int4_in_bytes=False,  # choose_mp_linear_kernel has int4 on Arm and Intel GPUs alone
        source="compressed_tensors.py, utils.py and compressed_tensors_moe_wna16.py of 0.32.0, "
        "which are the same in 0.33.0",
    ),
    "vLLM 0.26.0": Loader(
        heads=_HEADS,
        classes_first=True,
        embeddings=frozenset(),
        fp8_a16_experts=False,
        weights_in_bytes=False,
        source="find_matched_target of 0.26.0 asks for names, then classes, then parts",
    ),
}
