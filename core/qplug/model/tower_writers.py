"""What the towers of a model, for pictures and sound, write into the residual stream.

Pictures and sounds enter the stream in the place of embeddings, or are added to it behind the first
blocks. Text does not pass the towers, so no trial on text finds what they write: this is a table.
A family is in it if the last layer of its projector is linear, and if models of it answered to a
picture or a sound as they did before they were rotated (``tests/plugins/algorithms/test_towers``).
A projector that ends in a norm cannot be rotated: its weight is on the axis of the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from qplug.api import Stream, StreamAxis, TensorSpec
from qplug.errors import QplugError
from qplug.model.small_copy import SmallCopy


@dataclass(frozen=True)
class Towers:
    """The towers of models of ``types``, by names in memory, with a star for the way to them.

    ``parts``: all that text does not pass. ``writers``: the parameters in them that write into the
    stream, as patterns, in which ``#`` is the last number of a list; ``axis`` is that of the stream
    in each.
    """

    types: frozenset[str]
    parts: tuple[str, ...]
    writers: tuple[str, ...]
    axis: int = 0


def _towers(types: str, parts: str, writers: str, axis: int = 0) -> Towers:
    starred = [f"*{writer}" for writer in writers.split()]
    return Towers(frozenset(types.split()), tuple(parts.split()), tuple(starred), axis)


_PROJECTED = "vision_tower multi_modal_projector"
_HEARD = "audio_tower multi_modal_projector"

TOWERS: tuple[Towers, ...] = (
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


def towers_of(model_type: str) -> Towers | None:
    """What the table says of models of ``model_type``, or None."""
    return next((towers for towers in TOWERS if model_type in towers.types), None)


def unknown_parts(parts: Sequence[str], towers: Towers | None) -> tuple[str, ...]:
    """The ``parts``, names in memory, of which ``towers`` says nothing."""
    known = towers.parts if towers is not None else ()
    return tuple(part for part in parts if part.rpartition(".")[2] not in known)


def with_towers(
    stream: Stream, towers: Towers | None, copy: SmallCopy, tensors: Mapping[str, TensorSpec]
) -> Stream:
    """``stream`` with what ``towers`` write of the ``tensors`` of a model.

    ``copy`` tells the names on disk, and has all of the model's towers. Raises QplugError if a
    tensor has another shape than the table says, or if the checkpoint lacks it.
    """
    if towers is None:
        return stream
    found = dict(stream.tensors)
    parameters = dict(copy.model.named_parameters())
    writers = {name for pattern in towers.writers for name in _matching(pattern, parameters)}
    for parameter in sorted(writers):
        value = parameters[parameter]
        axis = towers.axis if value.ndim > 1 else 0
        for name, axis_on_disk in copy.on_disk(parameter, axis):
            spec = tensors.get(name)
            if spec is None or spec.shape[axis_on_disk] != stream.width:
                shape = "missing" if spec is None else list(spec.shape)
                raise QplugError(
                    f"{name}: is {shape}; it writes the residual stream, so its axis "
                    f"{axis_on_disk} should be {stream.width}"
                )
            found[name] = StreamAxis(axis_on_disk, None)
    return replace(stream, tensors=found)


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The ``names`` that match ``pattern``, of lists with ``#`` those of the last number alone."""
    found = [name for name in names if fnmatchcase(name, pattern.replace("#", "*"))]
    if "#" not in pattern:
        return found
    before = pattern.partition("#")[0].lstrip("*")
    numbers = {name: int(name.partition(before)[2].partition(".")[0]) for name in found}
    return [name for name in found if numbers[name] == max(numbers.values())]
