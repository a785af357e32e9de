"""The models of which SGLang knows the members of merged matrices: a table, without logic.

For them the class has ``packed_modules_mapping`` with ``qkv_proj`` and ``gate_up_proj``, in models/
of 0.5.23; those that 0.5.16 has, too, are the same there. For Llama, Mistral, Qwen2, dense Qwen3
and all others it is empty, and SGLang finds a merged matrix by its own name or not at all.
"""

from __future__ import annotations

SPLITS_MERGED_NAMES = frozenset(
    (
        "BeamForCausalLM",
        "Cohere2MoeForCausalLM",
        "Cohere2VisionForConditionalGeneration",
        "DeciLMForCausalLM",
        "Ernie4_5_ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "Exaone4ForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Gemma3nForConditionalGeneration",
        "Gemma4AssistantForCausalLM",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedAssistantForCausalLM",
        "Gemma4UnifiedForConditionalGeneration",
        "GemmaForCausalLM",
        "Glm5NextForConditionalGeneration",
        "HunYuanDenseV1ForCausalLM",
        "HunYuanMoEV1ForCausalLM",
        "InternS2MobiusForCausalLM",
        "InternS2MobiusForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration",
        "K2HorizonForCausalLM",
        "KimiK3ForConditionalGeneration",
        "LagunaForCausalLM",
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "MellumForCausalLM",
        "MiniCPMV2_6",
        "MiniCPMV4_0",
        "MiniCPMV4_5",
        "MiniCPMV4_6",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7",
        "MiniCPMV4_7ForConditionalGeneration",
        "MiniMaxM2ForCausalLM",
        "MiniMaxM3SparseForCausalLM",
        "MiniMaxM3SparseForConditionalGeneration",
        "MuseGlimmerForCausalLM",
        "MuseGlimmerForConditionalGeneration",
        "MuseSparkForConditionalGeneration",
        "MuseSparkTextForCausalLM",
        "PaddleOCRVLForConditionalGeneration",
        "Phi4MMForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen4ExpForConditionalGeneration",
        "XllmForCausalLM",
    )
)
