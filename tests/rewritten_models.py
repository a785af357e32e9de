"""Rewritten float models as checkpoints of their own, and as transformers computes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qplug.model.hollow import build, load_config
from qplug.model.stacked_experts import with_stacked_experts
from qplug.model.transposed import as_published
from qplug.run.prepare import Prepared


def save(prepared: Prepared, folder: Path) -> Path:
    """The rewritten model as a float32 checkpoint of its own."""
    folder.mkdir()
    source = prepared.checkpoint.folder
    tensors = {n: prepared.checkpoint.read(n) for n in prepared.checkpoint.tensors}
    hollow = build(load_config(source, trust_remote_code=False), source, trust_remote_code=False)
    tensors = as_published(hollow, with_stacked_experts(hollow, tensors))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(prepared.checkpoint.config))
    return folder


def reference(folder: Path) -> PreTrainedModel:
    """The model in ``folder``, in float32, of the class that its config.json names."""
    (architecture,) = load_config(folder, trust_remote_code=False).architectures or ()
    model: PreTrainedModel = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32
    )
    return model.eval()
