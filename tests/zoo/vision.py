"""Tiny models that see or hear: the text part is quantized, the towers stay float."""

from __future__ import annotations

from typing import Any

from transformers import Gemma4VisionConfig

from zoo.hybrids import LFM_2, LFM_2_SIZES, QWEN_4
from zoo.text import BY_KIND
from zoo.tiny import Tiny


def by_axes(*section: int, **others: Any) -> dict[str, Any]:
    """Returns the changes of a text part whose rotary embeddings are split among axes."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return {"text_config": {"rope_parameters": {**rotary, **others}}}


GEMMA_4_TOWER = Gemma4VisionConfig(
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=64,
    num_hidden_layers=2,
)
GLM_4V = by_axes(4, 6, 6, partial_rotary_factor=0.5)
#: transformers leaves the scale of Cohere's logits out beside a tower, and engines do not.
UNSCALED: dict[str, Any] = {"text_config": {"logit_scale": 1.0}}
GEMMA_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 384,
}

MODELS: dict[str, Tiny] = {
    "aria": Tiny(
        "AriaForConditionalGeneration",
        {"projector_patch_to_query_dict": {16: 4, 1225: 128, 4900: 256}},
    ),
    "audioflamingo3": Tiny("AudioFlamingo3ForConditionalGeneration"),
    "aya_vision": Tiny("AyaVisionForConditionalGeneration", UNSCALED),
    "blip2": Tiny("Blip2ForConditionalGeneration"),
    "chameleon": Tiny(
        "ChameleonForConditionalGeneration",
        {
            "vocabulary_map": {"<image>": 4100},
            "vq_config": {"base_channels": 32, "num_embeddings": 64, "resolution": 64},
        },
    ),
    "cohere2_vision": Tiny(
        "Cohere2VisionForConditionalGeneration",
        {"alignment_intermediate_size": 512, **UNSCALED},
    ),
    "cohere_compass": Tiny(
        "CohereCompassForConditionalGeneration",
        {"text_config": {"rope_parameters": BY_KIND, "tie_word_embeddings": True}},
    ),
    "cosmos3_edge": Tiny(
        "Cosmos3EdgeForConditionalGeneration",
        {
            "projector_hidden_size": 512,
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [12, 10, 10],
                }
            },
        },
    ),
    "deepseek_ocr2": Tiny(
        "DeepseekOcr2ForConditionalGeneration",
        {
            "vision_config": {"sam_config": {"downsample_channels": [64, 128]}},
            "text_config": {
                "mlp_layer_types": ["dense", "sparse"],
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "num_key_value_heads": 4,
            },
        },
    ),
    "deepseek_vl": Tiny("DeepseekVLForConditionalGeneration"),
    "diffusion_gemma": Tiny(
        "DiffusionGemmaForBlockDiffusion",
        {"text_config": {**GEMMA_EXPERTS, "per_layer_config": {"1": {"head_dim": 128}}}},
    ),
    "ernie4_5_vl_moe": Tiny(
        "Ernie4_5_VLMoeForConditionalGeneration",
        {"text_config": {"moe_intermediate_size": [512, 384], "num_attention_heads": 2}},
        published={"vision_config": {"embed_dim": 128, "mlp_ratio": 2}},
    ),
    "exaone4_5": Tiny("Exaone4_5_ForConditionalGeneration"),
    "fuyu": Tiny("FuyuForCausalLM", {"image_token_id": 4095}),
    "gemma3": Tiny("Gemma3ForConditionalGeneration"),
    "gemma4": Tiny("Gemma4ForConditionalGeneration", {"vision_config": GEMMA_4_TOWER}),
    "gemma4_moe": Tiny(
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 384,
            },
            "vision_config": GEMMA_4_TOWER,
        },
    ),
    "gemma4_unified": Tiny("Gemma4UnifiedForConditionalGeneration"),
    "glm46v": Tiny("Glm46VForConditionalGeneration", GLM_4V),
    "glm4v": Tiny("Glm4vForConditionalGeneration", GLM_4V),
    "glm4v_moe": Tiny(
        "Glm4vMoeForConditionalGeneration",
        GLM_4V,
        published={"text_config": {"head_dim": 64, "use_qk_norm": False}},
    ),
    "glm5_next": Tiny(
        "Glm5NextForConditionalGeneration",
        {
            "vision_config": {"projection_intermediate_size": 512},
            "text_config": {"linear_num_heads": 4},
        },
    ),
    "glm_ocr": Tiny("GlmOcrForConditionalGeneration", GLM_4V),
    "glmasr": Tiny("GlmAsrForConditionalGeneration"),
    "got_ocr2": Tiny("GotOcr2ForConditionalGeneration"),
    "granite4_vision": Tiny(
        "Granite4VisionForConditionalGeneration",
        {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [1],
            "use_spatial_sampling": False,
        },
    ),
    "granite_speech": Tiny(
        "GraniteSpeechForConditionalGeneration",
        {"projector_config": {"encoder_hidden_size": 128}},
    ),
    "hunyuan_vl": Tiny(
        "HunYuanVLForConditionalGeneration",
        {
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [8, 8, 8, 8],
                }
            }
        },
    ),
    "hyperclovax_vision_v2": Tiny("HyperCLOVAXVisionV2ForConditionalGeneration"),
    "idefics2": Tiny("Idefics2ForConditionalGeneration"),
    "idefics3": Tiny("Idefics3ForConditionalGeneration"),
    "internvl": Tiny("InternVLForConditionalGeneration"),
    "janus": Tiny(
        "JanusForConditionalGeneration",
        {
            "vq_config": {
                "base_channels": 32,
                "num_embeddings": 64,
                "projection_dim": 128,
                "image_token_embed_dim": 128,
            },
            "vision_config": {"projection_dim": 256},
        },
    ),
    "kimi_k25": Tiny("Kimi_K25ForConditionalGeneration", {"projection_hidden_size": 128}),
    "lfm2_vl": Tiny(
        "Lfm2VlForConditionalGeneration",
        {"text_config": LFM_2},
        published={"text_config": LFM_2_SIZES},
    ),
    "lfm3_vl": Tiny("Lfm3VlForConditionalGeneration"),
    "lighton_ocr": Tiny("LightOnOcrForConditionalGeneration"),
    "llama4": Tiny(
        "Llama4ForConditionalGeneration",
        {
            "vision_config": {
                "intermediate_size": 512,
                "projector_input_dim": 128,
                "projector_output_dim": 128,
                "vision_output_dim": 128,
            },
            "text_config": {"num_experts_per_tok": 1},
        },
    ),
    "llava": Tiny("LlavaForConditionalGeneration"),
    "llava_next": Tiny("LlavaNextForConditionalGeneration"),
    "llava_next_video": Tiny("LlavaNextVideoForConditionalGeneration"),
    "llava_onevision": Tiny(
        "LlavaOnevisionForConditionalGeneration", {"image_grid_pinpoints": [[112, 112]]}
    ),
    "minicpmv4_6": Tiny(
        "MiniCPMV4_6ForConditionalGeneration", {"image_token_id": 4096, "merger_times": 2}
    ),
    "minicpmv4_7": Tiny(
        "MiniCPMV4_7ForConditionalGeneration", {"image_token_id": 4096, "merger_times": 1}
    ),
    "minimax_m3_vl": Tiny(
        "MiniMaxM3SparseForConditionalGeneration",
        {"projector_hidden_size": 256, "merged_hidden_size": 1024},
    ),
    "mistral3": Tiny("Mistral3ForConditionalGeneration"),
    "mistral3_ministral3": Tiny(
        "Mistral3ForConditionalGeneration", {"text_config": {"model_type": "ministral3"}}
    ),
    "mistral_large4": Tiny("MistralLarge4ForConditionalGeneration"),
    "mllama": Tiny("MllamaForConditionalGeneration"),
    "molmo2": Tiny(
        "Molmo2ForConditionalGeneration",
        {
            "image_patch_id": 4099,
            "vision_config": {"image_size": [56, 56], "num_position_embeddings": 16},
            "adapter_config": {
                "vision_feature_layer": [1, 0],
                "hidden_size": 128,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "text_hidden_size": 256,
                "head_dim": 64,
            },
        },
    ),
    "muse_glimmer": Tiny(
        "MuseGlimmerForConditionalGeneration",
        {
            "out_hidden_size": 512,
            "projector_hidden_size": 256,
            "vision_config": {"intermediate_size": 256},
        },
    ),
    "nemotron_h_omni": Tiny(
        "NemotronH_Omni_Reasoning_V3",
        {
            "image_token_id": 4097,
            "projector_hidden_size": 256,
            "vision_hidden_size": 128,
            "video_temporal_patch_size": 2,
            "vision_config": {"video_temporal_patch_size": 2},
            "text_config": {
                "layers_block_type": ["mamba", "attention", "moe"],
                "num_hidden_layers": 3,
            },
        },
    ),
    "ovis2": Tiny("Ovis2ForConditionalGeneration"),
    "paddleocr_vl": Tiny("PaddleOCRVLForConditionalGeneration", by_axes(8, 12, 12)),
    "paligemma": Tiny(
        "PaliGemmaForConditionalGeneration",
        {"projection_dim": 256, "vision_config": {"projection_dim": 256}},
    ),
    "phi4_multimodal": Tiny(
        "Phi4MultimodalForCausalLM",
        {
            "audio_config": {
                "num_blocks": 1,
                "hidden_size": 128,
                "intermediate_size": 128,
                "ext_pw_out_channel": 128,
                "depthwise_separable_out_channel": 128,
                "nemo_conv_channels": 64,
            }
        },
    ),
    "pixtral_llava": Tiny(
        "LlavaForConditionalGeneration",
        {"vision_config": {"model_type": "pixtral"}, "text_config": {"model_type": "mistral"}},
    ),
    "qianfan_ocr": Tiny("QianfanOCRForConditionalGeneration"),
    "qwen2_5_omni_thinker": Tiny(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {**by_axes(8, 12, 12), "vision_start_token_id": 4110},
    ),
    "qwen2_5_vl": Tiny("Qwen2_5_VLForConditionalGeneration", by_axes(8, 12, 12)),
    "qwen2_audio": Tiny("Qwen2AudioForConditionalGeneration"),
    "qwen2_vl": Tiny(
        "Qwen2VLForConditionalGeneration",
        {**by_axes(8, 12, 12), "vision_config": {"hidden_size": 256}},
    ),
    "qwen3_5": Tiny(
        "Qwen3_5ForConditionalGeneration",
        by_axes(4, 2, 2, mrope_interleaved=True, partial_rotary_factor=0.25),
    ),
    "qwen3_5_moe": Tiny(
        "Qwen3_5MoeForConditionalGeneration",
        by_axes(4, 2, 2, mrope_interleaved=True, partial_rotary_factor=0.25),
    ),
    "qwen3_asr": Tiny("Qwen3ASRForConditionalGeneration"),
    "qwen3_omni_moe_thinker": Tiny(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {**by_axes(12, 10, 10, mrope_interleaved=True), "vision_start_token_id": 4110},
    ),
    "qwen3_vl": Tiny(
        "Qwen3VLForConditionalGeneration", by_axes(12, 10, 10, mrope_interleaved=True)
    ),
    "qwen3_vl_moe": Tiny(
        "Qwen3VLMoeForConditionalGeneration",
        by_axes(12, 10, 10, mrope_interleaved=True),
        published={"text_config": {"norm_topk_prob": True}},
    ),
    "qwen4_exp": Tiny("Qwen4ExpForConditionalGeneration", {"text_config": QWEN_4}),
    "smolvlm": Tiny("SmolVLMForConditionalGeneration"),
    "step3p7": Tiny("Step3p7ForConditionalGeneration", {"text_config": {"sliding_window": 16}}),
    "video_llama_3": Tiny("VideoLlama3ForConditionalGeneration"),
    "vipllava": Tiny(
        "VipLlavaForConditionalGeneration", {"vision_feature_layers": [-2, -1, 0, 1, 2]}
    ),
    "voxtral": Tiny("VoxtralForConditionalGeneration", {"audio_token_id": 4096}),
}
