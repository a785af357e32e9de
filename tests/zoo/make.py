"""Writes the checkpoint of a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from qplug.checkpoint.locate import DEMO, find_model
from zoo.catalogue import CATALOGUE
from zoo.shrink import shrunk
from zoo.tiny import Layout, Tiny

#: Weights whose start is more than noise: it says how states decay, or where tokens are.
_AS_BORN = ("A_log", "position_embedding.weight", "position_embeddings.weight", "conv1d.weight")
#: The spread of the others: large enough that the answers of models are not all alike.
_SPREAD = 0.06
#: Tokens by which processors ask the tokenizer for the places of pictures and sound.
_MARKS = {
    f"{kind}_token": f"<|{kind}|>"
    for kind in (
        "image",
        "video",
        "audio",
        "image_break",
        "image_end",
        "image_boundary",
        *("vision_bos", "vision_eos", "audio_bos", "audio_eos"),
        "boi",
        "eoi",
    )
}
#: So many weights are not tiny any more.
_LARGEST = 12_000_000


def make(name: str, folder: Path) -> Path:
    """Writes the model ``name`` of the catalogue into ``folder``, and returns ``folder``.

    Its weights are random, in bfloat16; its tokenizer is the demo model's. Raises KeyError if the
    catalogue has no ``name``.
    """
    tiny = CATALOGUE[name]
    model = built(tiny)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():  # some models keep tables of complex numbers
            value.data = value.data.to(torch.bfloat16)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model(DEMO) / file, folder)
    if processors := _processors(tiny):
        (folder / "preprocessor_config.json").write_text(json.dumps(processors), "utf-8")
        _add(folder / "tokenizer_config.json", {"extra_special_tokens": _MARKS})
    if tiny.published:
        _add(folder / "config.json", tiny.published)
    if tiny.layout is not None:
        _lay_out(folder, tiny.layout)
    return folder


def built(tiny: Tiny) -> PreTrainedModel:
    """Returns the model, with random weights, in float32."""
    model_class: type[PreTrainedModel] = getattr(transformers, tiny.architecture)
    kind = getattr(transformers, tiny.config) if tiny.config else model_class.config_class
    config = shrunk(kind, tiny.changes)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > _LARGEST:
        raise ValueError(f"{tiny.architecture}: {count} weights; shrink more fields")
    torch.manual_seed(0)
    model = model_class(shrunk(kind, tiny.changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith(_AS_BORN):
                parameter.normal_(std=_SPREAD)
            elif name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=_SPREAD)
    return model.eval()


def _processors(tiny: Tiny) -> dict[str, str]:
    """Returns the classes that prepare pictures and sound for the model, with their defaults."""
    kind = getattr(transformers, tiny.architecture).config_class.model_type.removesuffix("_thinker")
    pictures = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind)
    found = {
        "image_processor_type": pictures["torchvision"] if pictures else None,
        "feature_extractor_type": FEATURE_EXTRACTOR_MAPPING_NAMES.get(kind),
        "processor_class": PROCESSOR_MAPPING_NAMES.get(kind),
    }
    return {name: value for name, value in found.items() if value}


def _add(file: Path, fields: Mapping[str, Any]) -> None:
    """Adds ``fields`` to ``file``; mappings in it go over those of the same name."""
    plain = json.loads(file.read_text("utf-8"))
    for name, value in fields.items():
        plain[name] = {**plain.get(name, {}), **value} if isinstance(value, Mapping) else value
    file.write_text(json.dumps(plain, indent=2) + "\n", "utf-8")


def _lay_out(folder: Path, layout: Layout) -> None:
    """Writes the tensors and config.json again as ``layout`` changes them."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    for file, part in layout(tensors, config).items():
        save_file(part, folder / file, metadata={"format": "pt"})
        if file.startswith("model-"):
            index = {"metadata": {}, "weight_map": dict.fromkeys(part, file)}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
