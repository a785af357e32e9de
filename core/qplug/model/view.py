"""The view of a checkpoint: its linears and blocks, found in its module tree without weights.

No architecture needs a table (``plain_models`` only saves time): decoder blocks are the largest
list of modules, linears are the modules of that class. Names are those on disk, which engines use
too; transformers renames modules in memory and fuses experts, but on disk each expert has tensors
of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from qplug.api import ModelView, Reader
from qplug.api.reader import QUANTIZATION
from qplug.api.tensors import FLOAT_DTYPES, Checkpoint
from qplug.checkpoint.names import block_of, local_of, module_of, natural_order, split_name
from qplug.errors import QplugError
from qplug.model.block_list import decoder_blocks
from qplug.model.disk_names import tied_name
from qplug.model.kept_float import built_float
from qplug.model.known_towers import known_towers
from qplug.model.module_tree import ModuleTree
from qplug.model.plain_models import plain_tree
from qplug.model.skeleton import Skeleton
from qplug.model.stacked_experts import stacked_experts

_EXPERT = re.compile(r"\.experts\.\d+\.\w+$")


def model_view(checkpoint: Checkpoint, skeleton: Skeleton | None = None) -> ModelView:
    """The view of a float checkpoint, whose ``skeleton`` may be made already.

    Raises QplugError if the architecture is unknown, the checkpoint lacks a weight that the
    architecture has, or it is quantized already.
    """
    refuse_quantized(checkpoint)
    tree = plain_tree(checkpoint)
    if tree is None:
        tree = _tree(checkpoint, checkpoint.tensors, skeleton or Skeleton(checkpoint.folder))
        _check_whole(checkpoint, tree)
    return _view(checkpoint, tree, {})


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises QplugError if ``checkpoint`` is quantized already."""
    quantization = Reader.quantization(checkpoint.config)
    if quantization or any(key in checkpoint.config for key in QUANTIZATION):
        method = ascii(quantization.get("quant_method"))[:40]
        raise QplugError(
            f"{checkpoint.folder}: is quantized already, and no reader reads its quant_method "
            f"{method}; quantize the float model it came from"
        )


def packed_view(
    checkpoint: Checkpoint, packed: Mapping[str, tuple[int, int]], skeleton: Skeleton
) -> ModelView:
    """The view of a folder that holds the linears in ``packed`` as codes.

    ``packed``: shapes ``(out, in)`` by linear. ``skeleton``: of the folder. Linears of the
    architecture are in the view even if the folder lacks them.
    """
    weights = [f"{name}.weight" for name in packed]
    tree = _tree(checkpoint, {*checkpoint.tensors, *weights}, skeleton)
    return _view(checkpoint, tree, packed)


def _tree(checkpoint: Checkpoint, stored: Collection[str], skeleton: Skeleton) -> ModuleTree:
    """Returns the model of ``checkpoint``; ``stored`` are the names of its tensors, as float."""
    folder, model, names = checkpoint.folder, skeleton.model(), skeleton.names(stored)
    modules = {
        name: module
        for path, module in model.named_modules()
        if (name := names.module(path)) is not None
    }
    output = model.get_output_embeddings()
    head = next((path for path, module in model.named_modules() if module is output), None)
    if head is not None:
        on_disk = names.module(head) or tied_name(model, head)
        # A head of another name on disk (embed_out) is a float linear like others there; loaders
        # that ask for the head's own name find it in ignore.
        head = on_disk if local_of(on_disk) == local_of(head) else head
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # transformers says so of models without tokens
        table = None
    inputs = next((path for path, module in model.named_modules() if module is table), None)
    embedding = names.module(inputs) if isinstance(table, nn.Embedding) and inputs else None
    blocks = tuple(map(names.block, decoder_blocks(model, folder)))
    shapes = dict(names.shapes)
    for stack in stacked_experts(model, names):
        if stack.is_apart(stored) and any(each in stored for each, *_ in stack.linears()):
            whole = {each: shapes.pop(each) for each in stack.tensors}
            shapes |= {each: cut.shape(whole[of]) for each, of, _, cut in stack.linears()}
    idle = _idle_experts(shapes)
    shapes = {name: shape for name, shape in shapes.items() if module_of(name) not in idle}
    parts = {
        module_of(part)
        for name, of_linear in names.parts.items()
        if isinstance(model.get_submodule(module_of(name)), nn.Linear)
        for part in of_linear
        if local_of(part) == "weight"
    }
    return ModuleTree(
        linears={
            name: (module.out_features, module.in_features)
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
        },
        lookups=frozenset(n for n, module in modules.items() if isinstance(module, nn.Embedding)),
        blocks=blocks,
        head=head,
        embedding=embedding,
        parts=frozenset(parts),
        idle=frozenset(idle),
        tensors=shapes,
    )


def _idle_experts(shapes: Collection[str]) -> set[str]:
    """The linears, among those of the tensors ``shapes``, of experts that lack some of the others'.

    transformers has them where tokens that are routed to an expert come out as they are, and
    checkpoints need not have their weights.
    """
    experts: dict[str, dict[str, set[str]]] = {}
    for name in shapes:
        if _EXPERT.search(linear := module_of(name)):
            expert = module_of(linear)
            experts.setdefault(module_of(expert), {}).setdefault(expert, set()).add(linear)
    idle = set()
    for by_number in experts.values():
        most = max(map(len, by_number.values()))
        idle |= {name for own in by_number.values() if len(own) < most for name in own}
    return idle


def _view(
    checkpoint: Checkpoint, tree: ModuleTree, packed: Mapping[str, tuple[int, int]]
) -> ModelView:
    shapes = dict(packed)
    for tensor, stored in checkpoint.tensors.items():
        name, local = split_name(tensor)
        is_matrix = local == "weight" and len(stored.spec.shape) == 2
        if name in tree.idle:
            continue
        if is_matrix and name not in tree.lookups:
            shapes.setdefault(name, (stored.spec.shape[0], stored.spec.shape[1]))
    in_blocks = {name: s for name, s in tree.linears.items() if _is_in(tree.blocks, name)}
    shapes |= in_blocks
    floats = built_float(shapes, checkpoint.config)
    quantizable = {
        name
        for name in shapes
        if (
            name in in_blocks
            or _is_expert(tree.blocks, name)
            or (name in tree.parts and _is_in(tree.blocks, name))
        )
        and (name not in floats or floats[name].engines)
    }
    return ModelView(
        config=checkpoint.config,
        dtype=_float_dtype(checkpoint),
        linears={name: shapes[name] for name in natural_order(shapes)},
        quantizable=frozenset(quantizable),
        blocks=tree.blocks,
        head=tree.head,
        built_float=floats,
        embedding=tree.embedding,
        towers=known_towers(checkpoint.config),
    )


def with_embedding(view: ModelView, checkpoint: Checkpoint) -> ModelView:
    """Returns ``view`` with the embedding among its linears, as it is to be quantized.

    ``checkpoint`` has it as a float tensor; if it has not, ``view`` stays as it is.
    """
    name = view.embedding
    stored = None if name is None else checkpoint.tensors.get(f"{name}.weight")
    if name is None or stored is None or name in view.linears:
        return view
    out, width = stored.spec.shape
    return replace(view, linears={name: (out, width), **view.linears})


def _is_expert(blocks: tuple[str, ...], name: str) -> bool:
    return _EXPERT.search(name) is not None and _is_in(blocks, name)


def _is_in(blocks: tuple[str, ...], name: str) -> bool:
    return block_of(name, blocks) is not None


def float_tensors(
    checkpoint: Checkpoint, stored: Collection[str], *, trust_remote_code: bool = False
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that a float checkpoint of this architecture has, by name on disk.

    ``stored``: the names of the tensors in ``checkpoint`` if its codes were float weights. A head
    that is tied to the embedding has no tensor.
    """
    skeleton = Skeleton(checkpoint.folder, trust_remote_code=trust_remote_code)
    return dict(_tree(checkpoint, stored, skeleton).tensors)


def _check_whole(checkpoint: Checkpoint, tree: ModuleTree) -> None:
    for tensor, shape in tree.tensors.items():
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
