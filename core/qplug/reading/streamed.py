"""Loads a folder as a model whose blocks have weights only while they compute, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from qplug.checkpoint.names import is_within
from qplug.model.block_list import decoder_blocks
from qplug.model.disk_names import disk_names
from qplug.model.hollow import build, load_config
from qplug.model.parameters import empty_parameters, set_parameter
from qplug.reading.folder import Folder
from qplug.reading.load import compute_as_stored, load_folder

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def stream_folder(
    folder: Folder, device: torch.device, *, quantize_activations: bool = True
) -> PreTrainedModel:
    """Load ``folder`` as a float32 model on ``device`` that reads each block when it computes.

    The model computes the same as after ``load_folder``, but memory contains only the embedding,
    the head, and one block. Each forward pass reads every block from disk again. If transformers
    fuses the model's experts, the whole model is loaded: 4 bytes per parameter.
    """
    path = folder.checkpoint.folder
    config = load_config(path, trust_remote_code=folder.trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = build(config, path, trust_remote_code=folder.trust_remote_code)
    model.eval()
    names = disk_names(model, folder.float_names()).of_parameter
    own = [name for name, _ in model.named_parameters()]
    if not all(name in names and folder.holds(names[name]) for name in own):
        whole = load_folder(folder, quantize_activations=quantize_activations)
        whole.to(device)  # type: ignore[arg-type]
        return whole
    for block in decoder_blocks(model, path):
        module = model.get_submodule(block)
        inside = {name: names[f"{block}.{name}"] for name, _ in module.named_parameters()}
        module.register_forward_pre_hook(partial(_fill, folder, inside, device))
        module.register_forward_hook(partial(_empty, inside))
        own = [name for name in own if not is_within(block, name)]
    for name in own:
        set_parameter(model, name, folder.parameter(names[name]).to(device))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    model.tie_weights()
    compute_as_stored(model, folder, quantize_activations=quantize_activations)
    return model


def _fill(
    folder: Folder, names: Mapping[str, str], device: torch.device, module: nn.Module, *_: Any
) -> None:
    """Sets the parameters of ``module``; ``names`` are their names on disk, by local name."""
    for name, stored in names.items():
        set_parameter(module, name, folder.parameter(stored).to(device))


def _empty(names: Collection[str], module: nn.Module, *_: Any) -> None:
    empty_parameters(module, names)
