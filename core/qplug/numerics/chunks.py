"""Weights a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qplug.api.groups import (
    in_groups,
    row_step,
)
from qplug.api.scheme import (
    QuantArgs,
)

# Elements worked on at a time. On a CPU a chunk and its copies stay in a core's cache, which takes
# a quarter of the time of whole-matrix passes; a GPU wants much to do at once.
_CPU_CHUNK, GPU_CHUNK = 1 << 19, 1 << 26


def in_chunks(weight: Tensor, args: QuantArgs) -> Iterator[tuple[slice, Tensor]]:
    """Row steps of ``weight`` and their float32 groups, a few rows at a time."""
    step = row_step(args)
    total = -(-weight.shape[0] // step)
    chunk = _CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK
    size = max(1, chunk // (weight.shape[1] * step))
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        part = weight[rows.start * step : rows.stop * step]
        # A copy even of float32 weights: callers work in place.
        yield rows, in_groups(part.to(torch.float32, copy=True), args)
