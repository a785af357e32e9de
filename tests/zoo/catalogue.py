"""All tiny models, by name."""

from __future__ import annotations

from zoo import embedding, experts, hybrids, layouts, text, vision
from zoo.tiny import Tiny

#: The models of each family.
FAMILIES: dict[str, dict[str, Tiny]] = {
    "text": text.MODELS,
    "experts": experts.MODELS,
    "hybrids": hybrids.MODELS,
    "vision and sound": vision.MODELS,
    "embedding and ranking": embedding.MODELS,
    "layouts": layouts.MODELS,
}

CATALOGUE: dict[str, Tiny] = {
    name: tiny for models in FAMILIES.values() for name, tiny in models.items()
}


def family_of(name: str) -> str:
    """Returns the name of the family of the model ``name``."""
    return next(family for family, models in FAMILIES.items() if name in models)
