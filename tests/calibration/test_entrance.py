"""What enters the first block of a calibrated run is what enters it in the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.make import make

import qplug
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.model_part import part_for
from qplug.model.view import model_view
from qplug.reading.load import load
from qplug.registry.registry import Registry

#: A model, the part of it that reads text alone, and the module in memory whose input is compared:
#: the embedding is in two tensors on disk; the model asks where its first parameter is; it asks
#: for a picture.
MODELS = {
    "molmo2": ("", "model.language_model.layers.0.self_attn.q_proj"),
    "idefics3": ("", "model.text_model.layers.0.self_attn.q_proj"),
    "blip2": ("language_model", "language_model.model.decoder.layers.0.self_attn.q_proj"),
}


@pytest.mark.parametrize("name", MODELS)
def test_text_enters_the_blocks(tmp_path: Path, name: str, passes_in_float32: None) -> None:
    folder = make(name, tmp_path / name)
    tokens = torch.arange(3, 67)[None]
    source = open_checkpoint(folder)
    view = model_view(source)
    schemes = dict.fromkeys(view.quantizable, qplug.preset("W4A16"))
    samples = Samples(tokens)
    walk = Walk(source, view, schemes, samples, Session(Registry([])), propagate="float")

    model = load(str(folder))
    part, linear = MODELS[name]
    rows: list[Tensor] = []
    see = model.get_submodule(linear).register_forward_pre_hook(lambda _, x: rows.append(x[0][0]))
    with torch.no_grad():
        model.get_submodule(part)(input_ids=tokens)
    see.remove()
    (group, *_) = walk.gather(view.blocks[0]).groups
    torch.testing.assert_close(group.gram, rows[0].T @ rows[0], rtol=1e-4, atol=1e-4)
    walk.close()


class _Decoder(nn.Module):
    def forward(self, input_ids: Tensor, **other: Any) -> Tensor:
        return input_ids


class _AsksForPictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language = _Decoder()

    def forward(self, pixels: Tensor, input_ids: Tensor, **other: Any) -> Tensor:
        return input_ids


def test_a_model_that_asks_for_pictures_is_called_with_them() -> None:
    model = _AsksForPictures()
    assert part_for(model, "language", ["input_ids"]) is model.language
    assert part_for(model, "language", ["input_ids", "pixels"]) is model
    assert part_for(model, "", ["words"]) is model  # which then says what it lacks
