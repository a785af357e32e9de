"""The modules of an untrained model under their names on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleTree:
    """What a view needs of an untrained model, under its names on disk.

    ``linears`` has the shapes ``(out, in)`` of linears that are stored alone, by name; ``lookups``
    the names of embeddings. ``blocks`` are the decoder blocks, in order. ``head`` is the module
    that computes the logits, None if there is none; ``embedding`` the module that looks up tokens,
    None if the model names none. ``parts`` are the modules whose weights transformers joins or cuts
    into linears. ``idle`` are linears of experts that do not compute. ``tensors`` has the shapes of
    all tensors that a float checkpoint of the model has, by name.
    """

    linears: Mapping[str, tuple[int, int]]
    lookups: frozenset[str]
    blocks: tuple[str, ...]
    head: str | None
    embedding: str | None
    parts: frozenset[str]
    idle: frozenset[str]
    tensors: Mapping[str, tuple[int, ...]]
