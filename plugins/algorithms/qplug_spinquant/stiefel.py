"""Gradient descent on the orthogonal matrices by Cayley's map.

With the gradient ``G`` of a loss at ``Q``, ``A = Qᵀ G - Gᵀ Q`` is skew, and for any skew ``S``
``(I - S)⁻¹ (I + S)`` is orthogonal: ``Q <- Q (I - S)⁻¹ (I + S)`` with ``S = -t/2 A`` is a step
downhill that stays orthogonal (Li, Li and Todorovic, arXiv 2002.01113, equation 2; SpinQuant, arXiv
2405.16406, section 3.2). Orthogonal matrices are the square case of the Stiefel manifold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qplug.numerics import one_thread

#: A skew part below this share of the gradient is taken to be a rounding error.
_NOTHING = 1e-6


class CayleySGD(torch.optim.Optimizer):
    """Rotates orthogonal matrices ``[n, n]`` downhill, with momentum.

    ``lr``: the mean angle by which a step turns an axis, in radians, for any length of the
    gradient. ``fixed``: ``[n]`` or None; the product ``fixed Q`` stays the same.
    """

    def __init__(
        self, params: Sequence[Any], lr: float, momentum: float = 0.9, fixed: Tensor | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "fixed": fixed})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for q in group["params"]:
                if q.grad is not None:
                    self._turn(q, q.grad, group["lr"], group["momentum"], group["fixed"])

    def _turn(
        self, q: Tensor, gradient: Tensor, lr: float, momentum: float, fixed: Tensor | None
    ) -> None:
        inner = q.T @ gradient
        skew = inner - inner.T
        if fixed is not None:
            skew = _leaving(skew, fixed @ q)
        length = skew.norm() / len(q) ** 0.5
        if not skew.norm() > _NOTHING * inner.norm():
            return
        state = self.state[q]
        heading = state.get("heading", torch.zeros_like(skew)).mul_(momentum).add_(skew / length)
        state["heading"] = heading
        half = heading * (-lr / 2 * len(q) ** 0.5 / heading.norm())
        if fixed is not None:  # the rounding error of the removed part may be large for the rest
            half = _leaving(half, fixed @ q)
        one = torch.eye(len(q), device=q.device, dtype=q.dtype)
        with one_thread():  # the same bytes with any number
            turn = torch.linalg.solve(one - half, one + half)
        q.copy_(_nearer(q @ turn))


def orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to ``matrix``, which is nearly orthogonal, float64."""
    nearest = matrix.double()
    for _ in range(4):
        nearest = _nearer(nearest)
    return nearest


def _nearer(matrix: Tensor) -> Tensor:
    """One Newton-Schulz step to the nearest orthogonal matrix, so rounding errors do not grow."""
    return 1.5 * matrix - 0.5 * matrix @ (matrix.T @ matrix)


def _leaving(skew: Tensor, row: Tensor) -> Tensor:
    """``skew`` without the part that turns ``row``: ``P A P``, where ``P`` projects it out."""
    u = row / row.norm()
    along = torch.outer(skew @ u, u)
    return skew - (along - along.T)  # exactly skew
