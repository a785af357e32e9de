"""What is known of a model before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelView:
    """The skeleton of a checkpoint: its configuration and its matrices, without their values.

    ``linears`` has every weight that multiplies activations, by module name (``model.layers.0.
    mlp.up_proj``), with its shape ``(out, in)``: decoder linears, experts one by one, routers, and
    the head if it is a tensor of its own. ``quantizable`` are those that are quantized unless the
    user says otherwise: neither head nor router. ``blocks`` are the decoder blocks in order.
    ``head`` is the module that makes the logits, also where it is tied to the embedding. ``dtype``
    is that of the float weights.
    """

    config: Mapping[str, Any]
    dtype: str
    linears: Mapping[str, tuple[int, int]]
    quantizable: frozenset[str]
    blocks: tuple[str, ...]
    head: str | None
