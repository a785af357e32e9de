"""What the catalogue says of one tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: Changes what ``save_pretrained`` wrote, tensors and configuration, into what others publish: it
#: receives tensors by name and config.json, and returns tensors by file.
Layout = Callable[[dict[str, Tensor], dict[str, Any]], dict[str, dict[str, Tensor]]]


@dataclass(frozen=True)
class Tiny:
    """A tiny model: a class of transformers, and how its configuration differs from a shrunk one.

    ``changes`` go over the fields of the shrunk configuration; mappings in it over those of
    sub-configurations. ``layout`` changes the files. ``config`` is a class of configurations where
    the model's own one does not do.
    """

    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout | None = None
    config: str | None = None
