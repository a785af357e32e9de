"""The view of a checkpoint: its linears and blocks, found in its module tree without weights.

There is no table of architectures: decoder blocks are the largest list of modules, linears are the
modules of that class. Names are those on disk, which engines use too; transformers fuses experts in
memory, but on disk each expert has tensors of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qplug.api import ModelView
from qplug.api.tensors import FLOAT_DTYPES, Checkpoint
from qplug.errors import QplugError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from qplug.checkpoint.names import block_of, natural_order, split_name
from qplug.model.hollow import build, load_config

_EXPERT = re.compile(r"\.experts\.\d+\.\w+$")

# Linears that choose an expert. They are small and wrong choices are costly: engines keep floats.
_ROUTER = re.compile(r"\.(gate|router|shared_expert_gate|router\.(layer|classifier|proj))$")


def model_view(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> ModelView:
    """The view of a float checkpoint.

    Raises QplugError if the architecture is unknown, the checkpoint lacks a weight that the
    architecture has, or it is quantized already.
    """
    refuse_quantized(checkpoint)
    tree = _tree(checkpoint, trust_remote_code)
    _check_whole(checkpoint, tree)
    return _view(checkpoint, tree, {})


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises QplugError if ``checkpoint`` is quantized already."""
    if "quantization_config" in checkpoint.config or "compression_config" in checkpoint.config:
        raise QplugError(
            f"{checkpoint.folder}: is quantized already; quantize the float model it came from"
        )


def packed_view(
    checkpoint: Checkpoint,
    packed: Mapping[str, tuple[int, int]],
    *,
    trust_remote_code: bool = False,
) -> ModelView:
    """The view of a folder that holds the linears in ``packed`` as codes.

    ``packed``: shapes ``(out, in)`` by linear. Linears of the architecture are in the view even if
    the folder lacks them.
    """
    tree = _tree(checkpoint, trust_remote_code)
    return _view(checkpoint, tree, packed)


@dataclass(frozen=True)
class _Tree:
    """An untrained model: its modules by name, its decoder blocks, the name of its head."""

    modules: Mapping[str, nn.Module]
    blocks: tuple[str, ...]
    head: str | None

    def in_block(self, name: str) -> bool:
        return block_of(name, self.blocks) is not None


def _tree(checkpoint: Checkpoint, trust_remote_code: bool) -> _Tree:
    folder = checkpoint.folder
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model = build(config, folder, trust_remote_code=trust_remote_code)
    modules = dict(model.named_modules())
    output = model.get_output_embeddings()
    head = next((name for name, module in modules.items() if module is output), None)
    return _Tree(modules, decoder_blocks(model, folder), head)


def _view(checkpoint: Checkpoint, tree: _Tree, packed: Mapping[str, tuple[int, int]]) -> ModelView:
    dtype, shapes = _float_dtype(checkpoint), dict(packed)
    for tensor, stored in checkpoint.tensors.items():
        name, local = split_name(tensor)
        is_matrix = local == "weight" and len(stored.spec.shape) == 2
        if is_matrix and not isinstance(tree.modules.get(name), nn.Embedding):
            shapes.setdefault(name, (stored.spec.shape[0], stored.spec.shape[1]))
    for name, module in tree.modules.items():
        if isinstance(module, nn.Linear) and tree.in_block(name):
            shapes[name] = (module.out_features, module.in_features)
    quantizable = {
        name
        for name in shapes
        if tree.in_block(name)
        and (isinstance(tree.modules.get(name), nn.Linear) or _EXPERT.search(name))
        and not _ROUTER.search(name)
    }
    return ModelView(
        config=checkpoint.config,
        dtype=dtype,
        linears={name: shapes[name] for name in natural_order(shapes)},
        quantizable=frozenset(quantizable),
        blocks=tree.blocks,
        head=tree.head,
    )


def decoder_blocks(tree: nn.Module, folder: Path) -> tuple[str, ...]:
    """The names of the decoder blocks in ``tree``. Raises QplugError if there is no module list."""
    lists = [
        (name, module)
        for name, module in tree.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    if not lists:
        raise QplugError(f"{folder}: no list of decoder blocks in this architecture")
    # The outermost list with the most parameters: lists of experts lie inside it.
    name, module = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return tuple(f"{name}.{index}" for index in range(len(module)))


def float_tensors(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that a float checkpoint of this architecture has, by name on disk.

    Experts have separate tensors; a head that is tied to the embedding has none.
    """
    return _on_disk(_tree(checkpoint, trust_remote_code))


def _on_disk(tree: _Tree) -> dict[str, tuple[int, ...]]:
    from transformers.core_model_loading import revert_weight_conversion

    model: PreTrainedModel = tree.modules[""]  # type: ignore[assignment]
    tensors = revert_weight_conversion(model, dict(model.named_parameters()))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_whole(checkpoint: Checkpoint, tree: _Tree) -> None:
    for tensor, shape in _on_disk(tree).items():
        stored = checkpoint.tensors.get(tensor)
        if stored is None:
            raise QplugError(f"{checkpoint.folder}: the checkpoint lacks {tensor}")
        if stored.spec.shape != shape:
            raise QplugError(
                f"{checkpoint.folder}: {tensor} is {list(stored.spec.shape)}, "
                f"but config.json makes it {list(shape)}"
            )
        if stored.spec.dtype not in FLOAT_DTYPES:
            raise QplugError(
                f"{checkpoint.folder}: {tensor} is {stored.spec.dtype}; qplug quantizes models in "
                f"{', '.join(FLOAT_DTYPES)}"
            )


def _float_dtype(checkpoint: Checkpoint) -> str:
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if stated in FLOAT_DTYPES:
        return str(stated)
    stored = [t.spec.dtype for t in checkpoint.tensors.values() if t.spec.dtype in FLOAT_DTYPES]
    return max(set(stored), key=stored.count, default="float32")
