"""What the catalogue says of one tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: Tensors by name, by file.
Files = dict[str, dict[str, Tensor]]
#: Changes what ``save_pretrained`` wrote into what others publish: receives tensors by name and
#: config.json, which it may change, and returns the files.
Layout = Callable[[dict[str, Tensor], dict[str, Any]], Files]


@dataclass(frozen=True)
class Tiny:
    """A tiny model: a class of transformers, and how its configuration differs from a shrunk one.

    ``changes`` go over the fields of the shrunk configuration; mappings in it over those of
    sub-configurations. ``published`` are fields that config.json of published models has, and
    ``save_pretrained`` does not write. ``layout`` changes the files. ``config`` is a class of
    configurations where the model's own one does not do.
    """

    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout | None = None
    published: Mapping[str, Any] = field(default_factory=dict)
    config: str | None = None
