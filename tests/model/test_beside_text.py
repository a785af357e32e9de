"""Which parts of a model text does not pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo.make import make

from qplug.model.beside_text import beside_text
from qplug.model.hollow import load_config
from qplug.model.small_copy import SmallCopy

BESIDE = {
    "llama_ranking": (),
    "modernbert_ranking": (),
    "modernbert_decoder": (),
    "llava_next": ("model.image_newline", "model.vision_tower", "model.multi_modal_projector"),
    "qwen2_vl": ("model.visual",),
    # It lies inside of what transformers calls the decoder.
    "phi4_multimodal": ("model.embed_tokens_extend",),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_text(name: str, tmp_path: Path) -> None:
    config = load_config(make(name, tmp_path), trust_remote_code=False)
    copy = SmallCopy(config, tmp_path, trust_remote_code=False)
    before = copy.tensors()
    assert beside_text(copy) == BESIDE[name]
    after = copy.tensors()
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
