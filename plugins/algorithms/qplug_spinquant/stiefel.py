"""Descent on the orthogonal matrices, the square case of the Stiefel manifold, by Cayley's map.

With the gradient ``G`` of a loss at ``Q``, ``A = Qᵀ G - Gᵀ Q`` is skew, and for any skew ``S``
``(I - S)⁻¹ (I + S)`` is orthogonal: ``Q <- Q (I - S)⁻¹ (I + S)`` with ``S = -t/2 A`` is a step
downhill that stays on the manifold (Li, Li and Todorovic, arXiv 2002.01113, equation 2; SpinQuant,
arXiv 2405.16406, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: A part of the gradient as small as this is what rounding left of none.
_NOTHING = 1e-6


class CayleySGD(torch.optim.Optimizer):
    """Steps that turn the axes of orthogonal matrices ``[n, n]`` downhill, with momentum.

    ``lr`` is how far an axis is turned on average, in radians, whatever the length of the gradient.
    ``fixed``, ``[n]`` or None, is a row that the matrices leave as it is: ``fixed Q`` stays.
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
        if fixed is not None:  # what rounding left of a large part is large beside a small rest
            half = _leaving(half, fixed @ q)
        one = torch.eye(len(q), device=q.device, dtype=q.dtype)
        q.copy_(_nearer(q @ torch.linalg.solve(one - half, one + half)))


def orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix next to one that nearly is, float64."""
    made = matrix.double()
    for _ in range(4):
        made = _nearer(made)
    return made


def _nearer(matrix: Tensor) -> Tensor:
    """Newton and Schulz's step to the next orthogonal matrix: what rounding adds does not grow."""
    return 1.5 * matrix - 0.5 * matrix @ (matrix.T @ matrix)


def _leaving(skew: Tensor, row: Tensor) -> Tensor:
    """``skew`` without what turns ``row``: ``P A P``, ``P`` projecting beside it."""
    u = row / row.norm()
    along = torch.outer(skew @ u, u)
    return skew - (along - along.T)  # skew to the last bit
