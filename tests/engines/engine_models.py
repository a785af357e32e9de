"""The float models of the engine tests: small ones, of kinds that engines load differently."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qplug.checkpoint.locate import DEMO, find_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Weights of the random ones: large enough that their answers are not all alike.
_SPREAD = 0.08


def write_models(base: Path) -> dict[str, Path]:
    """Every model by name. ``ref-19m`` is there where QPLUG_REFERENCE_MODEL names its folder."""
    from transformers import Qwen2ForCausalLM, Qwen3MoeForCausalLM

    models = {"demo": find_model(DEMO)}
    if "QPLUG_REFERENCE_MODEL" in os.environ:
        models["ref-19m"] = Path(os.environ["QPLUG_REFERENCE_MODEL"])
    for name, kind in (("qwen2", Qwen2ForCausalLM), ("qwen3-moe", Qwen3MoeForCausalLM)):
        models[name] = _write(kind, base / name)
    return models


def _write(kind: type[PreTrainedModel], folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    has_experts = "Moe" in kind.__name__
    config = kind.config_class(**sizes, **(experts if has_experts else {}))
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(std=_SPREAD * (5 if name.endswith("bias") else 1))
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model(DEMO) / file, folder)
    return folder
