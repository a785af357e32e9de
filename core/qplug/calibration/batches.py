"""Sizes of batches of calibration samples, and the dtype in which blocks compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch

from qplug.calibration.samples import Samples

#: Tokens in one forward pass through a block.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 4096}


def samples_in_a_batch(length: int, device: torch.device) -> int:
    """The number of samples of ``length`` tokens in one forward pass."""
    return max(1, _BATCH_TOKENS[device.type] // length)


def passing_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype of forward passes: the ``stored`` one where the device multiplies it fast.

    GPUs multiply all dtypes fast. CPUs with instructions for bfloat16 multiply it twice as fast as
    float32; other CPUs would emulate it, which is slower than float32, so they use float32.
    """
    if device.type != "cpu" or (stored == torch.bfloat16 and _multiplies_bfloat16()):
        return stored
    return torch.float32


def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def counted_tokens(parts: Sequence[Sequence[Samples]]) -> list[int]:
    """The number of tokens that statistics count in each batch, over all processes.

    ``parts``: the batches of each process.
    """
    counts = [[batch.count for batch in part] for part in parts]
    return [sum(of_batch) for of_batch in zip_longest(*counts, fillvalue=0)]
