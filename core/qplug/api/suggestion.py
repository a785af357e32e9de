"""Which algorithms are worth trying for a scheme, as plugins measured them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from qplug.api.scheme import Scheme

#: Schemes that lose alike: weights in integers of at most 4 bits, and in floats of at most 4 bits;
#: weights of more bits with inputs in integers; all others.
Kind: TypeAlias = Literal["few-bit integers", "few-bit floats", "integer inputs", "others"]

_FEW_BITS = 4


@dataclass(frozen=True)
class Suggestion:
    """Algorithms that are worth trying for schemes of one ``kind``.

    ``algorithms`` are names as in a recipe, ``"awq"`` or ``"awq+gptq"``. ``loss`` is the rise of
    the perplexity, measured on text that calibration has not seen, as a share of the rise by
    rounding to nearest: 0.5 wins half of it back. ``usual``: whether qplug takes these algorithms
    for a user who names none; of several suggestions the one with the least ``loss`` counts.
    """

    algorithms: str
    kind: Kind
    loss: float
    usual: bool = False


def kind_of_scheme(scheme: Scheme) -> Kind:
    """Returns the kind of schemes that ``scheme`` belongs to, for which plugins suggest."""
    if scheme.weights.bits <= _FEW_BITS:
        return "few-bit floats" if scheme.weights.is_float else "few-bit integers"
    inputs = scheme.activations
    return "integer inputs" if inputs is not None and not inputs.is_float else "others"
