"""Reads and lays out safetensors files: eight bytes, a JSON header, and the tensors' bytes.

The first eight bytes are the length of the header; there are no gaps between tensors. Files are
read and written a tensor at a time, at known offsets. They are not memory-mapped: mapped pages
count as memory of the process, and a shard is larger than all other memory of a run together. The
layout is the one that the ``safetensors`` library writes, byte for byte.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from qplug.api import StoredTensor, TensorSpec
from qplug.errors import QplugError
from qplug.files.json_text import parse_json
from qplug.files.regular import open_regular

if TYPE_CHECKING:
    from torch import Tensor

#: The name of each torch dtype in a safetensors header.
CODES = {
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
    "float32": "F32",
    "int32": "I32",
    "uint32": "U32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "uint16": "U16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {code: dtype for dtype, code in CODES.items()}

# The order of dtypes in a file, as the library lays tensors out: the largest first.
_LIBRARY_ORDER = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_MAX_HEADER = 64 << 20  # bytes
_MAX_AXES, _MAX_ELEMENTS = 32, 1 << 48
_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class FileTensor(StoredTensor):
    """A tensor in a safetensors file, at the bytes ``start .. start + nbytes`` of ``path``."""

    path: Path
    spec: TensorSpec
    start: int

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def location(self) -> str:
        return f"{self.path.name} {self.start}"

    def read(self) -> Tensor:
        """Returns a copy of the tensor in memory. Raises QplugError if the file became shorter."""
        import numpy as np
        import torch

        # NumPy asks for large pages. With small ones the system spends more time on giving memory
        # to the process than on copying bytes into it.
        pages = np.empty(max(1, self.nbytes), np.uint8)  # torch cannot view memory of 0 bytes
        return self.read_into(torch.from_numpy(pages)[: self.nbytes])

    def read_into(self, buffer: Tensor) -> Tensor:
        """Returns the tensor, read into ``buffer``, uint8 ``[nbytes]`` on the CPU.

        Raises QplugError if the file became shorter.
        """
        import torch

        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            rest: memoryview = buffer.numpy().data
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise QplugError(f"{self.path} became shorter while it was read")
                rest = rest[count:]
        return buffer.view(getattr(torch, self.spec.dtype)).view(self.spec.shape)

    def read_rows(self, rows: slice) -> Tensor:
        """Returns a copy of some rows; ``rows`` has a start and a stop on the first axis."""
        count, *rest = self.spec.shape
        spec = TensorSpec(self.spec.dtype, (rows.stop - rows.start, *rest))
        return FileTensor(self.path, spec, self.start + self.nbytes // count * rows.start).read()

    def chunks(self) -> Iterator[bytes]:
        """Yields the tensor's bytes, 16 MiB at a time.

        Raises QplugError if the file became shorter.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise QplugError(f"{self.path} became shorter while it was read")
                left -= len(chunk)
                yield chunk


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor on the CPU; a contiguous tensor is not copied."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def read_header(path: Path, *, within: Path | None = None) -> dict[str, FileTensor]:
    """Returns the tensors of a file by name, without reading their values.

    Raises QplugError if the file cannot be read, is not a regular file, is a link to outside the
    folder ``within``, is truncated or too long, or has a malformed header.
    """
    try:
        with open_regular(path, within=within) as file:
            size = os.fstat(file.fileno()).st_size
            text = _header_text(file, size)
    except OSError as error:
        raise QplugError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise QplugError(f"{path}: not a sound safetensors file: {error}") from error
    entries, begin = parse_json(text, f"{path}: not a sound safetensors file"), 8 + len(text)
    tensors, ends = {}, {}
    try:
        if not isinstance(entries, dict):
            raise ValueError("its header is no mapping")
        for name, entry in entries.items():
            if name != "__metadata__":
                start, ends[name] = _offsets(entry)
                tensors[name] = FileTensor(path, _spec(entry), begin + start)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{name[:300]} lacks {error}" if isinstance(error, KeyError) else error
        raise QplugError(f"{path}: not a sound safetensors file: {reason}") from error
    end = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end or begin + ends[name] != end + tensor.nbytes:
            raise QplugError(f"{path}: not a sound safetensors file: {name[:300]} is out of place")
        end += tensor.nbytes
    if size != end:
        what = "cut short" if size < end else "too long"
        raise QplugError(f"{path}: {what}: its header describes {end} bytes, it has {size}")
    return tensors


def _header_text(file: BinaryIO, size: int) -> bytes:
    """Returns the JSON of the header of ``file``, which has ``size`` bytes."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > _MAX_HEADER:
        raise ValueError(f"it has no header of up to {_MAX_HEADER >> 20} MiB")
    if 8 + length > size:
        raise ValueError("its header is cut short")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("its header is cut short")
    return text


def _offsets(entry: object) -> tuple[int, int]:
    """Returns where a tensor begins and ends, in bytes after the header."""
    if not isinstance(entry, dict):
        raise ValueError(f"{_shown(entry)} is no tensor")
    offsets = entry["data_offsets"]
    if not (isinstance(offsets, list) and len(offsets) == 2 and _are_sizes(offsets)):
        raise ValueError(f"{_shown(offsets)} are no offsets")
    return offsets[0], offsets[1]


def _shown(value: object) -> str:
    """``value`` for a message, without control characters and of a limited length."""
    text = ascii(value)[1:-1] if isinstance(value, str) else ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _are_sizes(numbers: list[object]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _spec(entry: Mapping[str, object]) -> TensorSpec:
    code, shape = entry["dtype"], entry["shape"]
    if not (isinstance(code, str) and code in _DTYPES):
        raise ValueError(f"dtype {_shown(code)} is not known")
    if not (isinstance(shape, list) and len(shape) <= _MAX_AXES and _are_sizes(shape)):
        raise ValueError(f"{_shown(shape)} is no shape")
    if math.prod(max(side, 1) for side in shape) > _MAX_ELEMENTS:  # torch multiplies sides too
        raise ValueError(f"{_shown(shape)} is too large a shape")
    return TensorSpec(_DTYPES[code], tuple(shape))


def lay_out(path: Path, specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, FileTensor]]:
    """Returns the header of a new file at ``path``, and its tensors with their places, by name.

    Nothing is written. Tensors are ordered by size of dtype, largest first, then by name, so that
    every tensor is aligned.
    """
    order = sorted(specs, key=lambda n: (_LIBRARY_ORDER.index(CODES[specs[n].dtype]), n))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        end = offset + specs[name].nbytes
        entries[name] = {
            "dtype": CODES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    tensors = {}
    offset = len(header)
    for name in order:
        tensors[name] = FileTensor(path, specs[name], offset)
        offset += tensors[name].nbytes
    return header, tensors
