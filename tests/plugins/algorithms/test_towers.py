"""A model that sees or hears answers to pictures and sounds as it did before it was rotated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten_models import reference, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from zoo.catalogue import CATALOGUE
from zoo.make import built, make

from qplug import QplugError
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.architectures import by_linear
from qplug.model.known_towers import TOWERS
from qplug.model.view import model_view
from qplug.recipe.recipe import Recipe
from qplug.recipe.spellings import parse_scheme
from qplug.registry.registry import Registry
from qplug.run.prepare import Prepared, prepare
from qplug.run.stages import Stages

#: What float32 may lose, relative to the logits.
RTOL = 1e-5
#: Tokens on each side of a picture.
AROUND = 6


def rotated(folder: Path) -> Prepared:
    source = by_linear(open_checkpoint(folder), Registry([]))
    recipe = Recipe(("quarot",), parse_scheme("W8A8"), "fake")
    stages = Stages(recipe, Session(Registry.installed()))
    return prepare(stages, source, model_view(source), Session(Registry([])))


def tiny(name: str, folder: Path) -> Path:
    """The tiny model in float32: rotated biases would be rounded to bfloat16 again."""
    file = make(name, folder) / "model.safetensors"
    tensors = {tensor: value.float() for tensor, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def square(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    size = getattr(model.config.vision_config, "image_size", None) or 56
    return {
        "pixel_values": noise(1, 3, *([size, size] if isinstance(size, int) else size), seed=seed)
    }


def several(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """The whole of a large picture, its parts, and its size."""
    (picture,) = square(model, seed).values()
    height, width = model.config.image_grid_pinpoints[0]
    count = height * width // picture[0, 0].numel()
    parts = noise(1, 1 + count, *picture.shape[1:], seed=seed)
    return {"pixel_values": parts, "image_sizes": torch.tensor([[height, width]])}


def sized(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    pictures = square(model, seed)
    height, width = pictures["pixel_values"].shape[-2:]
    return {**pictures, "image_sizes": torch.tensor([[height, width]])}


def in_a_row(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    return {"pixel_values": square(model, seed)["pixel_values"][None]}


def patches(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Flat patches of a picture of 8 x 8."""
    config = model.config.vision_config
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", None) or 3
    deep = getattr(config, "temporal_patch_size", 1)
    size = channels * deep * config.patch_size**2
    return {
        "pixel_values": noise(64, size, seed=seed),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }


def shaped(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    config = model.config.vision_config
    return {
        "pixel_values": noise(1, 64, 3 * config.patch_size**2, seed=seed),
        "spatial_shapes": torch.tensor([[8, 8]]),
        "pixel_attention_mask": torch.ones(1, 64, dtype=torch.long),
    }


def pooled(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """A crop of 4 x 4 patches, of which each token pools four."""
    size = model.config.vision_config.patch_size
    return {
        "pixel_values": noise(1, 16, 3 * size**2, seed=seed),
        "image_token_pooling": torch.arange(16).view(4, 4),
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
    }


def flat_patches(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Of a picture of 8 x 8, whose tower has no depth for pictures."""
    size = model.config.vision_config.patch_size
    return {
        "pixel_values": noise(64, 3 * size**2, seed=seed),
        "image_grid_hw": torch.tensor([[8, 8]]),
    }


def in_strips(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    size = model.config.vision_config.patch_size
    return {
        "pixel_values": noise(1, 3, size, 64 * size, seed=seed),
        "target_sizes": torch.tensor([[8, 8]], dtype=torch.int32),
    }


def merged(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    return {**patches(model, seed), "image_merge_sizes": torch.tensor([1])}


def projected(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Patches for a model without a tower, which projects them alone."""
    return {"pixel_values": noise(1, 16, 3 * model.config.patch_size**2, seed=seed)}


def whole_patches(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    size = model.config.vision_config.patch_size
    return {
        "pixel_values": noise(64, 3, size, size, seed=seed),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }


SEES: dict[str, Callable[[PreTrainedModel, int], dict[str, Tensor]]] = {
    **dict.fromkeys(
        (
            *("aya_vision", "cohere2_vision", "internvl", "llava", "qianfan_ocr", "vipllava"),
            *("llama4", "aria", "got_ocr2", "paligemma", "deepseek_vl", "ovis2"),
            *("deepseek_ocr2", "step3p7"),
        ),
        square,
    ),
    **dict.fromkeys(("mistral3", "mistral_large4", "lighton_ocr"), sized),
    **dict.fromkeys(
        ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision"), several
    ),
    **dict.fromkeys(("idefics3", "smolvlm"), in_a_row),
    **dict.fromkeys(
        (
            *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
            *("cohere_compass", "glm4v_moe", "minimax_m3_vl", "qwen2_5_omni_thinker"),
            *("qwen3_omni_moe_thinker", "cosmos3_edge"),
        ),
        patches,
    ),
    "video_llama_3": merged,
    "lfm2_vl": shaped,
    "fuyu": projected,
    "molmo2": pooled,
    "nemotron_h_omni": flat_patches,
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7"), in_strips),
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), whole_patches),
}


def sound(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    config = model.config.audio_config
    inputs = {"input_features": noise(1, config.num_mel_bins, 200, seed=seed)}
    known = inspect.signature(model.forward).parameters
    mask = {"input_features_mask", "feature_attention_mask"} & known.keys()
    return {**inputs, **dict.fromkeys(mask, torch.ones(1, 200, dtype=torch.long))}


def frames(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    return {"input_features": noise(1, 60, model.config.encoder_config.input_dim, seed=seed)}


HEARS: dict[str, Callable[[PreTrainedModel, int], dict[str, Tensor]]] = {
    **dict.fromkeys(
        (
            *("audioflamingo3", "glmasr", "qwen2_audio", "qwen3_asr", "voxtral"),
            *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
        ),
        sound,
    ),
    "granite_speech": frames,
}


def taken(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> int:
    """How many tokens the picture or the sound takes."""
    kind = "image" if "pixel_values" in inputs else "audio"
    find: Any = getattr(model, f"get_{kind}_features", None)
    if find is None:
        found: Any = getattr(model.model, f"get_{kind}_features", None)
        if found is None:  # Qwen2-Audio: a quarter of the frames
            return inputs["input_features"].shape[-1] // 4
        find = found
    output = find(**inputs)
    features = getattr(output, "pooler_output", output)
    if features is None and (added := getattr(output, "deepstack_features", None)):
        _, features = added[0]
    features = output.last_hidden_state if features is None else features
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)


@torch.no_grad()
def answer(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    config, kind = model.config, "image" if "pixel_values" in inputs else "audio"
    mark = getattr(config, f"{kind}_token_id", None) or getattr(config, f"{kind}_token_index")
    words = noise(2 * AROUND, seed=5).abs().mul(1000).long() % 4000 + 3
    marks = torch.full((taken(model, inputs),), mark)
    tokens = torch.cat([words[:AROUND], marks, words[AROUND:]])[None]
    more: dict[str, Any] = {}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        more["mm_token_type_ids"] = (tokens == mark).int()
    if "attention_mask" in inspect.signature(model.forward).parameters:
        more["attention_mask"] = torch.ones_like(tokens)
    found: Tensor = model(input_ids=tokens, use_cache=False, **inputs, **more).logits
    return found


def of_phi(model: PreTrainedModel, kinds: str, seed: int) -> Tensor:
    """The logits of Phi-4-multimodal for a picture of 13 tokens, a sound of 5, or both."""
    picture, sound = "picture" in kinds, "sound" in kinds
    marks = [model.config.vision_config.image_token_id] * 13 if picture else []
    marks += [model.config.audio_config.audio_token_id] * 5 if sound else []
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([[5, 6, *marks, 7, 8]])}
    if picture:
        inputs["image_pixel_values"] = noise(1, 2, 3, 56, 56, seed=seed)
        inputs["image_sizes"] = torch.tensor([[448, 448]])
        inputs["image_attention_mask"] = torch.ones(1, 2, 4, 4)
    if sound:
        inputs["audio_input_features"] = noise(1, 40, 80, seed=seed)
        inputs["audio_embed_sizes"] = torch.tensor([5])
    with torch.no_grad():
        found: Tensor = model(**inputs, use_cache=False).logits
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


#: Of each kind of table rows one: the others take a minute together.
FEW = {"llava_next", "qwen3_vl", "ovis2", "qwen3_asr"}


@pytest.mark.parametrize(
    ("name", "inputs_of"),
    [
        pytest.param(
            name,
            given,
            id=f"{name}-{given.__name__}",
            marks=[] if name in FEW else pytest.mark.slow,
        )
        for name, given in (*SEES.items(), *HEARS.items())
    ],
)
def test_a_picture_or_a_sound_is_answered_as_before(
    name: str, inputs_of: Callable[[PreTrainedModel, int], dict[str, Tensor]], tmp_path: Path
) -> None:
    source = tiny(name, tmp_path / "model")
    model = reference(source)
    inputs = inputs_of(model, 1)
    wanted = answer(model, inputs)
    assert distance(answer(model, inputs_of(model, 2)), wanted) > 100 * RTOL
    turned = reference(save(rotated(source), tmp_path / "out"))
    assert distance(answer(turned, inputs), wanted) <= RTOL


def test_what_phi_sees_and_hears(tmp_path: Path) -> None:
    """Its towers lie inside of the part for text, and it projects sounds beside pictures apart."""
    source = tiny("phi4_multimodal", tmp_path / "model")
    model = reference(source)
    turned = reference(save(rotated(source), tmp_path / "out"))
    for kinds in ("picture", "sound", "picture and sound"):
        wanted = of_phi(model, kinds, 1)
        assert distance(of_phi(model, kinds, 2), wanted) > 100 * RTOL
        assert distance(of_phi(turned, kinds, 1), wanted) <= RTOL


@pytest.mark.slow
def test_what_nemotron_hears(tmp_path: Path) -> None:
    """The tiny model of the catalogue only sees."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    more = {"num_hidden_layers": 1, "projection_hidden_size": 128, "projection_bias": True}
    tower = {"model_type": "parakeet_encoder", "subsampling_conv_channels": 32, **sizes, **more}
    of_tiny = CATALOGUE["nemotron_h_omni"]
    changes = {**of_tiny.changes, "audio_token_id": 4098, "audio_config": tower}
    built(replace(of_tiny, changes=changes)).save_pretrained(tmp_path / "model")
    model = reference(tmp_path / "model")
    heard, other = ({"input_features": 100 * noise(1, 200, 80, seed=seed)} for seed in (1, 2))
    wanted = answer(model, heard)
    assert distance(answer(model, other), wanted) > 100 * RTOL
    turned = reference(save(rotated(tmp_path / "model"), tmp_path / "out"))
    assert distance(answer(turned, heard), wanted) <= RTOL


def test_each_family_of_the_table_is_tried() -> None:
    """But Chameleon, which makes tokens of pictures."""
    types = {kind for towers in TOWERS for kind in towers.types}
    assert types == {*SEES, *HEARS, "phi4_multimodal", "chameleon"}


def test_a_projector_of_another_width_is_refused(tmp_path: Path) -> None:
    of_tiny = CATALOGUE["qwen3_vl"]
    changes = {**of_tiny.changes, "vision_config": {"out_hidden_size": 128}}
    built(replace(of_tiny, changes=changes)).save_pretrained(tmp_path)
    with pytest.raises(
        QplugError, match=r"linear_fc2\.\w+: is \[128\b.*\]; .* axis 0 should be 256"
    ):
        rotated(tmp_path)


def test_what_a_norm_follows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QplugError, match=r"model\.vision_tower writes what the decoder reads, too"):
        rotated(make("hunyuan_vl", tmp_path / "model"))
