"""Loads a folder as a transformers model that computes as an engine does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qplug.checkpoint.config_file import CONFIG
from qplug.checkpoint.names import is_within, relative_name
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.disk_names import modules_on_disk
from qplug.model.foreign import naming_file
from qplug.model.hollow import build, load_config
from qplug.model.kv_cache import round_cache
from qplug.model.on_disk import as_on_disk, blocks_by_name, modules_of_blocks
from qplug.model.online_rotation import rotate_inputs
from qplug.model.queries import round_queries
from qplug.model.quiet import quiet_transformers
from qplug.model.rounding_hooks import InputRounding, round_inputs_of
from qplug.model.stacked_experts import with_stacked_experts
from qplug.model.transposed import as_published, with_linears
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
    """Load a float or quantized model as a transformers model that computes in ``dtype``.

    ``model`` is a folder, a Hub id, or ``qplug:demo``; ``dtype`` a name such as "bfloat16". Weights
    are dequantized. Unless ``quantize_activations`` is false, the model rounds the inputs of
    linears by their scheme, and keys and values by the scheme of the KV cache; queries too, if the
    folder has scales for them. Raises QplugError if
    files are missing or damaged, or if no exporter reads the folder's format.
    """
    session = Session.alone(registry=registry, trust_remote_code=trust_remote_code)
    folder = open_folder(model, session, or_float=True)
    return load_folder(folder, dtype=dtype, quantize_activations=quantize_activations)


def load_folder(
    folder: Folder, *, dtype: str = "float32", quantize_activations: bool = True
) -> PreTrainedModel:
    """Like ``load``, for an open folder."""
    inputs = [scheme.activations for scheme in folder.schemes.values() if scheme.activations]
    if quantize_activations and any(args.use_qtorch for args in inputs):
        require_qtorch()
    target = getattr(torch, dtype)
    path = folder.checkpoint.folder
    config = load_config(path, trust_remote_code=folder.trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    hollow = build(config, path, trust_remote_code=folder.trust_remote_code)
    kind = type(hollow)
    state = {name: tensor.to(target) for name, tensor in folder.weights()}
    state = as_published(hollow, with_stacked_experts(hollow, state))
    # transformers fills missing tensors with random numbers; `loading` lists them.
    try:
        with quiet_transformers(), naming_file(path / CONFIG, "the model does not load"):
            loaded: Any = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=target,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except QplugError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise QplugError(f"{path}: experts are missing, or differ in shape") from error
    model: PreTrainedModel = with_linears(loaded[0])
    loading: dict[str, Any] = loaded[1]
    faulty = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    if faulty:
        raise QplugError(f"{path}: {min(faulty)} is missing, or has the wrong shape")
    model.eval()
    compute_as_stored(model, folder, quantize_activations=quantize_activations)
    return model


def compute_as_stored(
    model: PreTrainedModel, folder: Folder, *, quantize_activations: bool = True
) -> None:
    """Make ``model`` rotate and round the inputs of its linears, and round its KV cache.

    The manifest of ``folder`` names the rotated inputs, its schemes say how to round. Raises
    QplugError if ``folder`` lacks a scale, or if ``model`` has fused a linear away.
    """
    modules = modules_on_disk(model, folder.float_names())
    if folder.manifest is not None:
        rotate_inputs(modules, folder.manifest.online)  # rotation comes before rounding
    if quantize_activations:
        _quantize_activations(model, folder, modules)
        if folder.kv_cache is not None:
            round_cache(model, folder.kv_cache, folder.cache_scales())
            _round_queries(model, folder)


def _round_queries(model: PreTrainedModel, folder: Folder) -> None:
    rounded = folder.queries()
    blocks = blocks_by_name(model, folder.view.blocks) if rounded else {}
    for name, queries in rounded.items():
        block = next(block for block in blocks if is_within(block, name))
        try:
            attention = blocks[block].get_submodule(relative_name(block, name))
        except AttributeError as error:
            raise QplugError(f"{name}: has a scale of queries, and is no module") from error
        round_queries(attention, queries, name)


def _quantize_activations(
    model: PreTrainedModel, folder: Folder, modules: Mapping[str, nn.Module]
) -> None:
    rounded = {n: s.activations for n, s in folder.schemes.items() if s.activations is not None}
    if any(name not in modules for name in rounded):  # transformers fuses experts
        blocks = as_on_disk(model, folder.view.blocks, folder.float_names())
        modules = {**modules, **modules_of_blocks(blocks)}
    for name in rounded:
        check_widths(name, folder.view.linears[name][1], folder.schemes[name])
        if not isinstance(modules.get(name), nn.Linear):
            raise QplugError(f"{name}: transformers fuses it, so qplug cannot round its inputs")
    for name, args in rounded.items():
        rounding = InputRounding(args, folder.input_scale(name))
        round_inputs_of(modules[name], {"": rounding})
