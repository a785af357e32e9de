"""The Gram matrix of many rows ``x``: the sum of ``xᵀx``, float32.

It is symmetric, so only the upper half is computed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Rows of ``G`` that are computed at a time. Entries left of their diagonal block are mirrored.
_PANEL = {"cpu": 1024, "cuda": 2048}
#: Values of ``x`` that a CPU collects in float32 before it multiplies: each product writes all of
#: ``G``, so products of many rows are cheaper.
_ROOM = 1 << 24
_MOST_ROWS = 4096


class Gram:
    """``G: [in, in]``, the sum of ``xᵀx`` over all rows ``x`` that were added."""

    def __init__(
        self,
        width: int,
        device: torch.device,
        room: Tensor | None = None,
    ) -> None:
        """``room``: float32 zeros ``[width, width]``, in which ``G`` is summed, if not its own."""
        # Only the upper half is summed.
        self._sum = torch.zeros(width, width, device=device) if room is None else room
        self._panel = _PANEL.get(device.type, 2048)
        self._is_whole = True
        self._waiting = torch.empty(0, width)  # on a CPU: rows that are not in the sum yet
        self._filled = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of ``x: [tokens, in]``."""
        if x.device.type == "cpu":
            self._gather(x)
        elif x.dtype == torch.float32:
            self.value.addmm_(x.T, x)
        elif len(self._sum) <= self._panel and hasattr(torch.ops.aten.addmm, "dtype_out"):
            torch.addmm(self._sum, x.T, x, out_dtype=torch.float32, out=self._sum)
        else:
            self._is_whole = False
            for start in range(0, len(self._sum), self._panel):
                stop = start + self._panel
                # Exact all the same: products of half-precision numbers fit into float32.
                self._sum[start:stop, start:] += torch.mm(
                    x[:, start:stop].T, x[:, start:], out_dtype=torch.float32
                )

    @property
    def value(self) -> Tensor:
        """``G``, float32. Each call returns the same tensor, brought up to date."""
        if self._filled:
            self._multiply(self._waiting[: self._filled])
        self._filled, self._waiting = 0, self._waiting[:0].clone()
        if not self._is_whole:
            for start in range(0, len(self._sum), self._panel):
                stop = start + self._panel
                self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
            self._is_whole = True
        return self._sum

    def _gather(self, x: Tensor) -> None:
        most = max(1, min(_MOST_ROWS, _ROOM // x.shape[1]))
        if not self._filled and len(x) >= most:  # many rows at once need no waiting
            for rows in x.split(most):
                self._multiply(rows.float())
            return
        if not len(self._waiting):
            self._waiting = torch.empty(most, x.shape[1])
        while len(x):
            count = min(len(x), len(self._waiting) - self._filled)
            self._waiting[self._filled : self._filled + count] = x[:count]
            self._filled += count
            if self._filled == len(self._waiting):
                self._multiply(self._waiting)
                self._filled = 0
            x = x[count:]

    def _multiply(self, x: Tensor) -> None:
        """Add the products of the rows ``x: [tokens, in]``, float32.

        NumPy multiplies a matrix by its own transpose with BLAS's syrk, which torch does not use.
        """
        self._is_whole = False
        sums, rows = self._sum.numpy(), x.numpy()  # the same memory
        with np.errstate(all="ignore"):  # readers of the sums check whether they are finite
            for start in range(0, rows.shape[1], self._panel):
                stop = start + self._panel
                panel = rows[:, start:stop]
                sums[start:stop, start:stop] += panel.T @ panel
                sums[start:stop, stop:] += panel.T @ rows[:, stop:]
