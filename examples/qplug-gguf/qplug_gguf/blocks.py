"""Q8_0 and Q4_0: 32 weights of a row and their scale, as bytes in a run.

A block is the scale ``d`` in float16 and the codes: of Q8_0 32 signed bytes ``q``, of Q4_0 16
bytes, the low halves of which are the first 16 codes ``q + 8`` and the high halves the others. A
weight is ``d * q``.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 32
_SCALE_BYTES = 2


def block_bytes(bits: int) -> int:
    """Bytes of a block of 4- or 8-bit codes."""
    return _SCALE_BYTES + WIDTH * bits // 8


def to_bytes(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Blocks of int8 ``codes: [out, in]`` and ``scale: [out, in / 32]``, uint8 ``[out, bytes]``."""
    blocks = codes.unflatten(1, (-1, WIDTH))
    if bits == 8:
        packed = blocks.view(torch.uint8)
    else:
        low, high = (blocks + 8).to(torch.uint8).chunk(2, -1)
        packed = low | (high << 4)
    scales = scale.half().contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.cat([scales, packed], -1).flatten(1)


def from_bytes(stored: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse: codes int8 ``[out, in]``, and scales float32 ``[out, in / 32]``."""
    blocks = stored.unflatten(1, (-1, block_bytes(bits)))
    scale = blocks[..., :_SCALE_BYTES].contiguous().view(torch.float16).squeeze(-1).float()
    packed = blocks[..., _SCALE_BYTES:].contiguous()
    if bits == 8:
        return packed.view(torch.int8).flatten(1), scale
    codes = torch.cat([packed & 15, packed >> 4], -1).to(torch.int8) - 8
    return codes.flatten(1), scale
