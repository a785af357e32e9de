"""Weights, a few rows at a time."""

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

# Elements in a chunk. On a CPU a chunk and its copies stay in the cache of a core, which takes a
# quarter of the time of passes over the whole matrix; a GPU is fast on large chunks.
_CPU_CHUNK, GPU_CHUNK = 1 << 19, 1 << 26


def in_chunks(weight: Tensor, args: QuantArgs) -> Iterator[tuple[slice, Tensor]]:
    """Yields row steps of ``weight: [out, in]`` and their float32 groups, a few rows at a time."""
    step = row_step(args)
    total = -(-weight.shape[0] // step)
    chunk = _CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK
    size = max(1, chunk // (weight.shape[1] * step))
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        part = weight[rows.start * step : rows.stop * step]
        # Float32 weights are copied too: callers work in place.
        yield rows, in_groups(part.to(torch.float32, copy=True), args)
