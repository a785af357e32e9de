"""The description of a model that is known before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BuiltFloat:
    """Why a weight stays float: engines build its module without quantization.

    ``engines`` are the names of the engines that do so (``vLLM``, ``SGLang``); empty for all.
    ``reason`` completes the sentence "it stays float: ...". ``source`` names the file of the engine
    and its version, or whatever else the statement rests on. ``renamed`` is a part of the weight's
    name, and what an engine that renames it makes of that: ``(".conv.", ".short_conv.")``.
    """

    reason: str
    engines: tuple[str, ...] = ()
    source: str = ""
    renamed: tuple[str, str] | None = None


@dataclass(frozen=True)
class Towers:
    """What towers of a model, for pictures or sound, write into the residual stream.

    Text does not pass towers, so what they write is not found by trial. A rotation of the stream
    rotates it, too. All names are those in memory, of ``named_modules`` and ``named_parameters``.

    ``parts``: the last names of the topmost modules and parameters that text does not pass:
    ``("vision_tower", "projector", "image_newline")``. ``writers``: patterns of the parameters in
    them whose values are added to the stream or take the place of embeddings, such as the last
    linear of a projector with its bias: ``"*.projector.linear_2.*"``. In a pattern ``*`` is
    anything, and one ``#`` the last number of each list: ``"*.merger.mlp.#.linear_2.*"``. There
    are none if the tower only makes tokens. ``axis``: the axis of writers with two or more axes
    that is as long as the stream is wide: 0 in linears, 1 in tables whose rows are looked up.

    What a norm makes cannot be rotated, so a tower that ends in one must not be named.
    """

    parts: tuple[str, ...]
    writers: tuple[str, ...]
    axis: int = 0


@dataclass(frozen=True)
class ModelView:
    """The structure of a checkpoint: its configuration and its linears, without their values.

    ``config`` is config.json. ``dtype`` is the dtype of the float weights. ``linears`` maps the
    module name of every linear (``model.layers.0.mlp.up_proj``) to the shape ``(out, in)`` of its
    weight: linears of decoder blocks, each expert's separately, routers, and the head if it has a
    tensor of its own. ``quantizable`` are the linears that an engine can load as codes, which are
    all but head and routers. ``blocks`` are the names of the decoder blocks, in order. ``head`` is
    the name of the module that computes the logits, even if its weight is tied to the embedding;
    None if the model has none. ``embedding`` is the name of the module that looks up the vectors of
    tokens, None if qplug knows none. It is among ``linears``, as rows of a matrix ``(tokens,
    width)``, only if it is quantized, and never among ``quantizable``.

    ``built_float`` says why linears stay float whatever the scheme, by linear or other weight; a
    linear that only some engines build float may be in ``quantizable`` too. ``other_weights`` are
    the weights in the blocks with two or more axes that are no linears, such as experts stacked in
    one tensor: shapes by name, without ``.weight``. ``drafts`` are the linears among
    ``quantizable`` that are in draft layers (MTP), outside of the blocks: a run quantizes them only
    if it is asked to. qplug fills in both from the checkpoint.

    ``towers`` say what is rotated outside of the text part of a model that sees or hears. qplug
    fills in the rows that its table has for the model type; rows of a plugin are added to them, and
    take the place of a row that names one of their parts.
    """

    config: Mapping[str, Any]
    dtype: str
    linears: Mapping[str, tuple[int, int]]
    quantizable: frozenset[str]
    blocks: tuple[str, ...]
    head: str | None
    built_float: Mapping[str, BuiltFloat] = field(default_factory=dict)
    other_weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    drafts: frozenset[str] = frozenset()
    embedding: str | None = None
    towers: tuple[Towers, ...] = ()

    def is_tied(self, name: str) -> bool:
        """Whether ``name`` is the embedding, and the head is computed with the same tensor."""
        return name == self.embedding and self.head is not None and self.head not in self.linears

    @property
    def stacked_experts(self) -> tuple[str, ...]:
        """The names of the modules whose experts are stacked in tensors of ``other_weights``.

        Engines give this name to all experts of a layer: ``model.layers.0.mlp.experts``.
        """
        found: dict[str, None] = {}
        for name, shape in self.other_weights.items():
            if len(shape) == 3 and math.prod(shape[:2]) != shape[0]:  # else a depthwise convolution
                layer, inside, _ = f"{name}.".partition(".experts.")
                found[f"{layer if inside else name.rpartition('.')[0]}.experts"] = None
        return tuple(found)
