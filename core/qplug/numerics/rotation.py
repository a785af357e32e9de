"""Rotations of vectors by orthogonal matrices, some of which are never formed."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qplug.numerics.hadamard import hadamard_transform
from qplug.numerics.threads import one_thread


class Rotation(ABC):
    """An orthogonal matrix ``Q`` of ``size``."""

    size: int

    @abstractmethod
    def turn(self, x: Tensor) -> Tensor:
        """``x Q`` over the last axis of ``x: [..., size]``, in the dtype of ``x``."""

    def along(self, x: Tensor, axis: int) -> Tensor:
        """``x`` multiplied by ``Q`` over ``axis``, contiguous."""
        return self.turn(x.movedim(axis, -1)).movedim(-1, axis).contiguous()

    def matrix(self) -> Tensor:
        """``Q``, float64 ``[size, size]``."""
        return self.turn(torch.eye(self.size, dtype=torch.float64))


class HadamardRotation(Rotation):
    """A Hadamard matrix whose rows have random signs: ``diag(±1) H / sqrt(n)``."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        generator = torch.Generator().manual_seed(seed)
        self._signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1

    def turn(self, x: Tensor) -> Tensor:
        return hadamard_transform(x * self._signs.to(x.device))


class ExplicitRotation(Rotation):
    """A rotation given by its orthogonal ``matrix``, ``[size, size]``."""

    def __init__(self, matrix: Tensor) -> None:
        self.size, self._matrix = len(matrix), matrix

    def turn(self, x: Tensor) -> Tensor:
        return x @ self._matrix.to(x.device, x.dtype)


class RandomRotation(ExplicitRotation):
    """A uniformly random rotation: the ``Q`` of a Gaussian matrix, in float64."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
        with one_thread():
            q, r = torch.linalg.qr(gaussian)
        super().__init__(q * r.diagonal().sign())  # without the signs it is not uniform


class KeepingMean(Rotation):
    """Another rotation ``Q``, followed by a reflection that maps the vector ``1`` onto itself.

    Norms that subtract the mean, ``x - (x·1/n) 1ᵀ``, still do so in a basis that keeps ``1``. With
    ``1 Q = v``, the reflection ``I - 2 u uᵀ`` with ``u = (v - 1) / |v - 1|`` maps ``v`` to ``1``.
    """

    def __init__(self, inner: Rotation) -> None:
        self.size, self._inner = inner.size, inner
        away = inner.turn(torch.ones(inner.size, dtype=torch.float64)) - 1
        length = away.norm()
        self._away = away / length if length > 1e-9 else away * 0

    def turn(self, x: Tensor) -> Tensor:
        turned, away = self._inner.turn(x), self._away.to(x.device, x.dtype)
        reflected: Tensor = turned - 2 * (turned @ away)[..., None] * away
        return reflected
