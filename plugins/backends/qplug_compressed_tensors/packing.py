"""Packs codes into int32 words and back: code ``i`` of a row at bit ``i * bits``, low bits first.

Codes are packed densely: a code of 3, 5, 6 or 7 bits may begin in one word and end in the next, and
32 codes fill ``bits`` words. Packing of 4 and 8 bits works on bytes, two codes at a time: seven
times as fast as shifts on int32. For other widths 8 codes fill ``bits`` bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qplug import QuantArgs

if TYPE_CHECKING:
    from torch import Tensor


def stored_args(args: QuantArgs, scale: Tensor) -> QuantArgs:
    """A copy of ``args`` whose ``scale_dtype`` is the dtype of ``scale``."""
    return replace(args, scale_dtype=str(scale.dtype).removeprefix("torch."))


def word_count(codes: int, bits: int) -> int:
    """The number of int32 words that a row of ``codes`` codes fills."""
    return -(-codes * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes ``[rows, columns]`` into int32 ``[rows, ceil(columns * bits / 32)]``.

    The last word of a row is padded with zero bits. ``bits`` is 2 to 8.
    """
    import torch

    rows, columns = codes.shape
    gap = -columns % 32
    if gap:
        codes = torch.nn.functional.pad(codes, (0, gap))
    codes = codes.contiguous().view(-1)  # flat: a side of 1 may have a stride that forbids views
    if bits == 4:
        pairs = codes.view(torch.int16)
        codes = (pairs | (pairs >> 4)).to(torch.uint8)
    elif bits < 8:
        codes = _joined(codes.view(-1, 8), bits)
    words = codes.view(torch.int32).view(rows, -1)
    return words[:, : word_count(columns, bits)].contiguous() if gap else words


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack int32 ``[rows, words]`` into uint8 codes ``[rows, columns]``; ``bits`` is 2 to 8."""
    import torch

    rows, count = words.shape
    gap = -count % bits if bits not in (4, 8) else 0
    if gap:
        words = torch.nn.functional.pad(words, (0, gap))
    codes = words.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    if bits == 4:
        pairs = codes.to(torch.int16)
        codes = ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8)
    elif bits < 8:
        codes = _parted(codes.view(-1, bits), bits)
    return codes.view(rows, -1)[:, :columns]


def _joined(codes: Tensor, bits: int) -> Tensor:
    """The bytes ``[n * bits]`` of codes ``[n, 8]``, both uint8."""
    import torch

    joined = codes[:, 0].to(torch.int64)
    for place in range(1, 8):
        joined |= codes[:, place].to(torch.int64) << (place * bits)
    return joined.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)


def _parted(stored: Tensor, bits: int) -> Tensor:
    """The codes ``[n * 8]`` in bytes ``[n, bits]``, both uint8: the inverse of ``_joined``."""
    import torch

    joined = torch.zeros((stored.shape[0], 8), dtype=torch.uint8, device=stored.device)
    joined[:, :bits] = stored
    whole = joined.view(torch.int64).view(-1)
    codes = torch.empty_like(joined)
    for place in range(8):
        codes[:, place] = (whole >> (place * bits)) & (2**bits - 1)
    return codes.view(-1)
