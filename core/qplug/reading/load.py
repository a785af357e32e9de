"""A folder as a transformers model that computes as an engine does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.experts import as_on_disk
from qplug.model.hollow import build, load_config
from qplug.model.kv_cache import round_cache
from qplug.model.online_rotation import rotate_inputs
from qplug.model.quiet import quiet_transformers
from qplug.model.rounding_hooks import InputRounding, round_inputs_of
from qplug.numerics.qtorch import require_qtorch
from qplug.numerics.scales import check_widths
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from qplug.reading.folder import Folder, open_folder


def load(
    model: str,
    *,
    registry: Registry | None = None,
    dtype: str = "float32",
    quantize_activations: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A float or quantized folder as a transformers model that computes in ``dtype``.

    Weights are dequantized; inputs of linears are rounded as the scheme says, and keys and values
    as the KV cache has them, unless ``quantize_activations`` is false. Raises QplugError as
    ``open_folder``.
    """
    session = Session.alone(registry=registry, trust_remote_code=trust_remote_code)
    folder = open_folder(model, session)
    return load_folder(folder, dtype=dtype, quantize_activations=quantize_activations)


def load_folder(
    folder: Folder, *, dtype: str = "float32", quantize_activations: bool = True
) -> PreTrainedModel:
    """``load``, of a folder that is open already."""
    inputs = [scheme.activations for scheme in folder.schemes.values() if scheme.activations]
    if quantize_activations and any(args.use_qtorch for args in inputs):
        require_qtorch()
    target = getattr(torch, dtype)
    path = folder.checkpoint.folder
    config = load_config(path, trust_remote_code=folder.trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = type(build(config, path, trust_remote_code=folder.trust_remote_code))
    state = {name: tensor.to(target) for name, tensor in folder.weights()}
    # What is amiss comes back in `loading`; transformers would draw random numbers for it.
    try:
        with quiet_transformers():
            loaded: Any = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=target,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise QplugError(f"{path}: its experts are not all there, or differ in shape") from error
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    amiss = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    if amiss:
        raise QplugError(f"{path}: {min(amiss)} is not there, or not in the shape it should have")
    model.eval()
    compute_as_stored(model, folder, quantize_activations=quantize_activations)
    return model


def compute_as_stored(
    model: PreTrainedModel, folder: Folder, *, quantize_activations: bool = True
) -> None:
    """Have ``model`` rotate and round what its linears read, and its KV cache, as ``folder`` says.

    Raises QplugError if it has no scales, or no modules, to do so.
    """
    if folder.manifest is not None:
        rotate_inputs(model, folder.manifest.online)  # before they are rounded
    if quantize_activations:
        _quantize_activations(model, folder)
        if folder.kv_cache is not None:
            round_cache(model, folder.kv_cache, folder.cache_scales())


def _quantize_activations(model: PreTrainedModel, folder: Folder) -> None:
    rounded = {n: s.activations for n, s in folder.schemes.items() if s.activations is not None}
    modules = dict(model.named_modules())
    if any(name not in modules for name in rounded):  # experts, which transformers fuses
        floats = {f"{name}.weight" for name in folder.schemes}
        as_on_disk(model, folder.view.blocks, floats.union(folder.checkpoint.tensors))
        modules = dict(model.named_modules())
    for name in rounded:
        check_widths(name, folder.view.linears[name][1], folder.schemes[name])
        if not isinstance(modules.get(name), nn.Linear):
            raise QplugError(f"{name}: its activations cannot be quantized here: it is fused")
    roundings = {n: InputRounding(args, folder.input_scale(n)) for n, args in rounded.items()}
    round_inputs_of(model, roundings)
