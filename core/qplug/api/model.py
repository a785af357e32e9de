"""The description of a model that is known before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelView:
    """The structure of a checkpoint: its configuration and its linears, without their values.

    ``config`` is config.json. ``dtype`` is the dtype of the float weights. ``linears`` maps the
    module name of every linear (``model.layers.0.mlp.up_proj``) to the shape ``(out, in)`` of its
    weight: linears of decoder blocks, each expert's separately, routers, and the head if it has a
    tensor of its own. ``quantizable`` are the linears to quantize by default, which are all but
    head and routers. ``blocks`` are the names of the decoder blocks, in order. ``head`` is the name
    of the module that computes the logits, even if its weight is tied to the embedding; None if the
    model has none.
    """

    config: Mapping[str, Any]
    dtype: str
    linears: Mapping[str, tuple[int, int]]
    quantizable: frozenset[str]
    blocks: tuple[str, ...]
    head: str | None
