"""Computes the checksums of a finished folder, which ``qplug.json`` stores.

``qplug.json`` has two keys for them. ``"checksums"`` is a mapping::

    {"kind": "crc32",
     "tensors": {NAME: CRC, ...},                           the stored bytes of each tensor
     "headers": {SHARD: CRC, ...},                          a shard up to its first tensor
     "files": {PATH: {"bytes": SIZE, "crc32": CRC}, ...}}   every other file but qplug.json

``"checksum"``, the last key, covers the rest of ``qplug.json``. All of them are CRC-32, which a
disk is slower than, and which notices every change of up to 32 bits in a row.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

KIND = "crc32"
CHECKSUMS = "checksums"
CHECKSUM = "checksum"

_CHUNK = 1 << 20  # bytes


def crc32(pieces: Iterable[bytes | memoryview]) -> int:
    """Returns the CRC-32 of bytes in pieces."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc


def file_checksum(path: Path) -> dict[str, int]:
    """Returns the entry of a file in ``"files"``: its size in bytes and its CRC-32."""
    size, crc = 0, 0
    for piece in _pieces(path):
        size, crc = size + len(piece), zlib.crc32(piece, crc)
    return {"bytes": size, KIND: crc}


def header_checksum(path: Path) -> int:
    """Returns the CRC-32 of a safetensors file up to its first tensor.

    These are eight bytes, which are the length of the JSON header, and the JSON header. Of a file
    that is shorter than they say, the CRC-32 of the whole file.
    """
    with path.open("rb") as file:
        length = file.read(8)
        rest, crc = int.from_bytes(length, "little"), zlib.crc32(length)
        while rest and (piece := file.read(min(rest, _CHUNK))):
            rest, crc = rest - len(piece), zlib.crc32(piece, crc)
    return crc


def record_checksum(record: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of the content of ``qplug.json``, without its key ``"checksum"``.

    It does not depend on the order of keys and on white space. Raises ValueError if a number is not
    finite.
    """
    rest = {key: value for key, value in record.items() if key != CHECKSUM}
    text = json.dumps(
        rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``record`` with its checksum as the last key.

    ``record`` has only values that JSON has, and str as keys. Raises ValueError if a number is not
    finite.
    """
    rest = {key: value for key, value in record.items() if key != CHECKSUM}
    return {**rest, CHECKSUM: record_checksum(rest)}


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            yield piece
