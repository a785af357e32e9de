"""The layers of a model that draft tokens ahead (MTP): which of their linears may hold codes.

transformers builds no draft layers. Engines build them of the same modules as decoder blocks, and
what joins them to the model (``eh_proj``, ``mtp.fc``) without quantization.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qplug.api import Checkpoint, ModelView
from qplug.checkpoint.draft_names import inside_draft, is_draft, without_count
from qplug.checkpoint.names import block_of, kind_of, module_of, relative_name


def draft_names(names: Iterable[str], blocks: tuple[str, ...]) -> list[str]:
    """Returns those of ``names``, of tensors or linears, that are parts of draft layers."""
    of = module_of(blocks[0]) if blocks else None
    outside = (name for name in names if block_of(name, blocks) is None)
    return [name for name in outside if is_draft(name, len(blocks), of)]


def with_drafts(view: ModelView) -> ModelView:
    """Returns ``view`` with the linears of draft layers that may hold codes.

    They are those that have the name of a quantizable linear of a decoder block, within the layer.
    """
    kinds = set()
    for name in view.quantizable:
        number = block_of(name, view.blocks)
        if number is not None:
            kinds.add(kind_of(f"{relative_name(view.blocks[number], name)}."))
    drafts = {
        name
        for name in draft_names(view.linears, view.blocks)
        if kind_of(f"{inside_draft(name)}.") in kinds
        and (name not in view.built_float or view.built_float[name].engines)
    }
    return replace(view, quantizable=view.quantizable | drafts, drafts=frozenset(drafts))


def without_drafts(checkpoint: Checkpoint, blocks: tuple[str, ...]) -> Checkpoint:
    """Returns ``checkpoint`` without its draft layers, which config.json no longer announces."""
    drafts = {*draft_names(checkpoint.tensors, blocks)}
    tensors = {name: t for name, t in checkpoint.tensors.items() if name not in drafts}
    return replace(checkpoint, config=without_count(checkpoint.config), tensors=tensors)
