"""The share of the weights in decoder blocks that stays float, and the part that nobody named.

A weight is a matrix, or a tensor of more axes, in a decoder block; embeddings, heads and norms are
none. A weight that qplug cannot quantize, such as experts stacked in one tensor, must not stay
float in silence: either the user ignores the weight by name, or engines build it float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from qplug.api import ModelView
from qplug.checkpoint.names import block_of, kind_of

#: The largest share of the weights in decoder blocks that may stay float without a name.
LIMIT = 0.1


@dataclass(frozen=True)
class FloatShare:
    """Shares of the weights in decoder blocks, by kind: a name with a star for each number.

    ``kinds`` are all weights that stay float, ``unnamed`` those that nobody named.
    """

    kinds: Mapping[str, float]
    unnamed: Mapping[str, float]

    @property
    def total(self) -> float:
        """The share of all weights that stay float, 0 to 1."""
        return min(1.0, math.fsum(self.kinds.values()))

    @property
    def silent(self) -> float:
        """The share of the weights that stay float without a name, 0 to 1."""
        return min(1.0, math.fsum(self.unnamed.values()))

    def refusal(self) -> str | None:
        """Returns why so many weights must not stay float, as a sentence; None if they may."""
        if self.silent <= LIMIT:
            return None
        options = " ".join(f"--ignore '{kind}'" for kind in self.unnamed)
        return (
            f"{self.silent:.0%} of the weights in decoder blocks would stay float: they are no "
            "linear layers that qplug can quantize, such as experts in one tensor; to keep them "
            f"float, pass {options}"
        )


def float_share(
    model: ModelView,
    quantized: Collection[str],
    is_named: Callable[[str], bool],
) -> FloatShare:
    """Returns the shares of the weights of ``model`` that are not among ``quantized``.

    ``is_named`` says whether the user ignored a weight by name, or an engine builds it float.
    """
    total = 0
    kinds: dict[str, int] = {}
    unnamed: dict[str, int] = {}
    for name, size in weight_sizes(model):
        total += size
        if name not in quantized:
            kind = kind_of(f"{name}.").removesuffix(".")
            kinds[kind] = kinds.get(kind, 0) + size
            if not is_named(name):
                unnamed[kind] = unnamed.get(kind, 0) + size
    return FloatShare(
        {kind: size / total for kind, size in kinds.items()},
        {kind: size / total for kind, size in unnamed.items()},
    )


def weight_sizes(model: ModelView) -> Iterator[tuple[str, int]]:
    """Yields the name and the number of parameters of each weight in a decoder block."""
    for name, shape in model.linears.items():
        if block_of(name, model.blocks) is not None:
            yield name, math.prod(shape)
    for name, other in model.other_weights.items():
        yield name, math.prod(other)
