"""What the towers of known models, for pictures and sound, write into the residual stream: a table.

Pictures and sounds enter the stream in the place of embeddings, or are added to it behind the first
blocks. Text does not pass the towers, so no trial on text finds what they write. A family is in the
table if the last layer of its projector is linear, and if models of it answered to a picture or a
sound as they did before they were rotated (``tests/plugins/algorithms/test_towers``). A projector
that ends in a norm cannot be rotated: its weight is on the axis of the stream. A plugin names the
towers of other models in ``ModelView.towers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qplug.api import Towers


@dataclass(frozen=True)
class KnownTowers:
    """A row: the ``towers`` of models whose model type is one of ``types``."""

    types: frozenset[str]
    towers: Towers


def _towers(types: str, parts: str, writers: str, axis: int = 0) -> KnownTowers:
    starred = tuple(f"*{writer}" for writer in writers.split())
    return KnownTowers(frozenset(types.split()), Towers(tuple(parts.split()), starred, axis))


_PROJECTED = "vision_tower multi_modal_projector"
_HEARD = "audio_tower multi_modal_projector"

TOWERS: tuple[KnownTowers, ...] = (
    _towers(
        "aya_vision cohere2_vision internvl lfm2_vl llava mistral3 mistral_large4 qianfan_ocr "
        "vipllava",
        _PROJECTED,
        "multi_modal_projector.linear_2.*",
    ),
    _towers(
        "llava_next llava_next_video llava_onevision",
        f"{_PROJECTED} image_newline",
        "multi_modal_projector.linear_2.* image_newline",
    ),
    _towers("llama4", "vision_model multi_modal_projector", "multi_modal_projector.linear_1.*"),
    _towers(
        "nemotron_h_omni",
        "vision_model vision_final_layernorm multi_modal_projector audio_tower embed_audio",
        "multi_modal_projector.linear_2.* embed_audio.linear_2.*",
    ),
    _towers("molmo2", _PROJECTED, "multi_modal_projector.image_projector.down_proj.weight"),
    _towers(
        "granite4_vision",
        "image_newline vision_tower layerwise_projectors spatial_projectors",
        "image_newline layerwise_projectors.*.out_linear.* spatial_projectors.*.out_linear.*",
    ),
    _towers("aria", _PROJECTED, "multi_modal_projector.feed_forward.linear_out.*"),
    _towers("got_ocr2", _PROJECTED, "multi_modal_projector.multimodal_projector.*"),
    _towers("minimax_m3_vl", _PROJECTED, "multi_modal_projector.merge_linear_2.*"),
    _towers("paligemma", _PROJECTED, "multi_modal_projector.linear.*"),
    _towers(
        "deepseek_ocr2",
        f"{_PROJECTED} view_separator",
        "multi_modal_projector.weight multi_modal_projector.bias view_separator",
    ),
    _towers(
        "step3p7",
        "vision_model multi_modal_projector",
        "multi_modal_projector.weight multi_modal_projector.bias",
    ),
    _towers("deepseek_vl", "vision_model aligner", "aligner.linear2.*"),
    _towers("kimi_k25", "vision_tower mm_projector", "mm_projector.out_proj.*"),
    _towers("lighton_ocr", "vision_encoder vision_projection", "vision_projection.linear_2.*"),
    _towers("idefics3 smolvlm", "vision_model connector", "connector.modality_projection.proj.*"),
    _towers("ovis2", "vision_tower visual_embeddings_table", "visual_embeddings_table.weight", 1),
    _towers("minicpmv4_6 minicpmv4_7", "vision_tower merger", "merger.mlp.#.linear_2.*"),
    _towers("cosmos3_edge", "visual projector", "projector.linear_fc2.*"),
    _towers("paddleocr_vl", "visual projector", "projector.linear_2.*"),
    _towers("video_llama_3", "vision_model projector", "projector.readout.2.*"),
    _towers("qwen2_vl qwen2_5_vl", "visual", "visual.merger.mlp.2.*"),
    _towers(
        "cohere_compass qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe",
        "visual",
        "visual.merger.linear_fc2.* visual.deepstack_merger_list.*.linear_fc2.*",
    ),
    _towers("glm4v_moe", "visual", "visual.merger.down_proj.*"),
    _towers("fuyu", "vision_embed_tokens", "vision_embed_tokens.*"),
    _towers("chameleon", "vqmodel", ""),  # it makes tokens of pictures
    _towers("audioflamingo3 glmasr qwen3_asr voxtral", _HEARD, "multi_modal_projector.linear_2.*"),
    _towers(
        "phi4_multimodal",
        "embed_tokens_extend",
        "embed_tokens_extend.image_embed.img_projection_down.* "
        "embed_tokens_extend.audio_embed.down_proj_for_*speech.*",
    ),
    _towers("qwen2_audio", _HEARD, "multi_modal_projector.linear.*"),
    _towers("granite_speech", "encoder projector", "projector.linear.*"),
    _towers(
        "qwen2_5_omni_thinker",
        "audio_tower visual",
        "visual.merger.mlp.2.* audio_tower.proj.*",
    ),
    _towers(
        "qwen3_omni_moe_thinker",
        "audio_tower visual",
        "visual.merger.mlp.2.* visual.merger_list.*.mlp.2.* audio_tower.proj2.*",
    ),
)


def known_towers(config: Mapping[str, Any]) -> tuple[Towers, ...]:
    """Returns the rows of the table for the model of ``config``, which is config.json."""
    return tuple(row.towers for row in TOWERS if config.get("model_type") in row.types)


def with_known(own: tuple[Towers, ...], config: Mapping[str, Any]) -> tuple[Towers, ...]:
    """Returns ``own`` and the rows of the table that name none of the parts in ``own``."""
    parts = {part for towers in own for part in towers.parts}
    return (*own, *(row for row in known_towers(config) if parts.isdisjoint(row.parts)))
