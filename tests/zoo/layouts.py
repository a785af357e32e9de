"""Files as they are published, where ``save_pretrained`` writes others."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.experts import MODELS as EXPERTS
from zoo.hybrids import MODELS as HYBRIDS
from zoo.tiny import Files, Tiny
from zoo.vision import MODELS as VISION

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def fused_experts(tensors: dict[str, Tensor], config: dict[str, Any]) -> Files:
    """Stacks experts: ``gate_up_proj: [experts, 2 * width, hidden]`` and ``down_proj``."""
    return {"model.safetensors": _stacked(tensors)}


def transposed_experts(tensors: dict[str, Tensor], config: dict[str, Any]) -> Files:
    """Writes stacked experts by columns: ``gate_up_proj: [experts, hidden, 2 * width]``."""
    turned = {
        name: tensor.mT.contiguous() if tensor.ndim == 3 and ".experts." in name else tensor
        for name, tensor in tensors.items()
    }
    return {"model.safetensors": turned}


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    experts: dict[str, dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        found = _EXPERT.fullmatch(name)
        if found is None:
            kept[name] = tensor
        else:
            experts[found[1]][found[3]][int(found[2])] = tensor
    for place, parts in experts.items():
        gate, up, down = (
            torch.stack([of[number] for number in sorted(of)])
            for of in (parts["gate"], parts["up"], parts["down"])
        )
        kept[f"{place}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        kept[f"{place}.down_proj"] = down
    return kept


def drafting_layer(tensors: dict[str, Tensor], config: dict[str, Any]) -> Files:
    """Adds a layer that drafts tokens after the last one, as DeepSeek and GLM number it."""
    added = _draft_of_deepseek(tensors, config)
    return {"model.safetensors": {**tensors, **added}}


def drafting_layer_outside(tensors: dict[str, Tensor], config: dict[str, Any]) -> Files:
    """Writes that layer into ``mtp.safetensors``, which the index does not name."""
    added = _draft_of_deepseek(tensors, config)
    return {"model-00001-of-00001.safetensors": tensors, "mtp.safetensors": added}


def _draft_of_deepseek(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    config["num_nextn_predict_layers"] = 1
    last, width = config["num_hidden_layers"], config["hidden_size"]
    above = f"model.layers.{last}"
    copied = {
        f"{above}.{name.removeprefix(f'model.layers.{last - 1}.')}": tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(f"model.layers.{last - 1}.")
    }
    return {
        **copied,
        f"{above}.eh_proj.weight": _noise(width, 2 * width),
        f"{above}.enorm.weight": _ones(width),
        f"{above}.hnorm.weight": _ones(width),
        f"{above}.shared_head.norm.weight": _ones(width),
        f"{above}.shared_head.head.weight": tensors["lm_head.weight"].clone(),
        f"{above}.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
    }


def drafting_head(tensors: dict[str, Tensor], config: dict[str, Any]) -> Files:
    """Adds ``mtp.*``, a head of Qwen that drafts tokens, to the other tensors."""
    text = config.get("text_config", config)
    text["mtp_num_hidden_layers"] = text["num_nextn_predict_layers"] = 1
    above = "model.language_model" if "text_config" in config else "model"
    last, width = text["num_hidden_layers"] - 1, text["hidden_size"]
    copied = {
        f"mtp.layers.0.{name.removeprefix(f'{above}.layers.{last}.')}": tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(f"{above}.layers.{last}.")
    }
    added = {
        "mtp.fc.weight": _noise(width, 2 * width),
        **{f"mtp.{norm}.weight": _ones(width) for norm in ("norm", "pre_fc_norm_hidden")},
        "mtp.pre_fc_norm_embedding.weight": _ones(width),
    }
    return {"model.safetensors": {**tensors, **copied, **added}}


def _noise(*shape: int) -> Tensor:
    return (0.06 * torch.randn(*shape)).to(torch.bfloat16)


def _ones(width: int) -> Tensor:
    return torch.ones(width, dtype=torch.bfloat16)


def _with(layout: Any, tiny: Tiny) -> Tiny:
    return replace(tiny, layout=layout)


MODELS: dict[str, Tiny] = {
    "deepseek_v3_mtp": _with(drafting_layer, EXPERTS["deepseek_v3"]),
    "deepseek_v32_mtp": _with(drafting_layer, EXPERTS["deepseek_v32"]),
    "glm4_moe_mtp": _with(drafting_layer, EXPERTS["glm4_moe"]),
    "glm4_moe_mtp_outside": _with(drafting_layer_outside, EXPERTS["glm4_moe"]),
    "qwen3_5_mtp": _with(drafting_head, VISION["qwen3_5"]),
    "qwen3_5_moe_mtp": _with(drafting_head, VISION["qwen3_5_moe"]),
    "qwen3_5_moe_hubfused": _with(fused_experts, VISION["qwen3_5_moe"]),
    "qwen3_5_moe_text_hubfused": _with(fused_experts, HYBRIDS["qwen3_5_moe_text"]),
    "qwen3_next_mtp": _with(drafting_head, HYBRIDS["qwen3_next"]),
    "qwen3_vl_moe_hubfused": _with(transposed_experts, VISION["qwen3_vl_moe"]),
}
