"""Refuses stored numbers that are NaN or infinite, or that overflow the dtype of the model.

The bits of floats without their sign are ordered like the magnitudes: the largest pattern says all
that has to be known, at several GB a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from qplug.api import TensorSpec
from qplug.errors import QplugError

#: Elements that are looked at together: their bits stay in the cache of the processor.
_PIECE = 1 << 17

#: The dtypes that have NaN, the unsigned integer of the same size, and the bits without the sign.
_PATTERNS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "float32": (np.uint32, 0x7FFFFFFF),
    "bfloat16": (np.uint16, 0x7FFF),
    "float16": (np.uint16, 0x7FFF),
    "float8_e4m3fn": (np.uint8, 0x7F),
    "float8_e5m2": (np.uint8, 0x7F),
}


@dataclass(frozen=True)
class Magnitudes:
    """The numbers of a tensor with ``spec``: what is too large for a model in ``model_dtype``."""

    name: str
    spec: TensorSpec
    model_dtype: str = "float32"

    def checked(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yields ``pieces``, the bytes of the tensor, whole elements each.

        Raises QplugError for a piece with a number that is NaN, infinite, or too large.
        """
        for piece in pieces:
            self.refuse(piece)
            yield piece

    def refuse(self, piece: bytes | memoryview) -> None:
        """Raises QplugError if a number in ``piece`` is NaN, infinite, or too large."""
        sentence = self.problem(piece)
        if sentence is not None:
            raise QplugError(f"{self.name}: {sentence}")

    def problem(self, piece: bytes | memoryview) -> str | None:
        """Returns what is wrong with the numbers in ``piece``, as a sentence; None if nothing."""
        if self.spec.dtype not in _PATTERNS:
            return None
        largest = _largest(piece, self.spec.dtype)
        if not largest < float("inf"):  # also NaN
            return "has NaN or infinite values; mend the float model"
        limit = torch.finfo(getattr(torch, self.model_dtype)).max
        # A single number is a constant of the code, such as the value of masked scores.
        if largest > limit and self.spec.shape:
            return (
                f"has values up to {largest:.3g}, which overflow {self.model_dtype}, the dtype in "
                "config.json; state bfloat16 there"
            )
        return None


def _largest(piece: bytes | memoryview, dtype: str) -> float:
    """Returns the largest magnitude in ``piece``; NaN or infinity if it contains one."""
    unsigned, mask = _PATTERNS[dtype]
    bits = np.frombuffer(piece, unsigned)
    top = max(
        (int((bits[n : n + _PIECE] & mask).max()) for n in range(0, len(bits), _PIECE)), default=0
    )
    pattern = torch.from_numpy(np.array([top], unsigned))
    return float(pattern.view(getattr(torch, dtype)).float())
