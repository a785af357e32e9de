"""Tensors in files, and the checkpoint that contains them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: The dtypes in which checkpoints keep float weights.
FLOAT_DTYPES = ("bfloat16", "float16", "float32")

# Files of the source that a run does not copy: weights in other formats, files that the run writes
# itself, and files that describe the source alone.
_NOT_COPIED = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack"),
    *("*.onnx", "*.index.json", "config.json", "qplug.json", "README.md", ".*"),
)
_BITS = {"float64": 64, "int64": 64, "uint64": 64, "float32": 32, "int32": 32, "uint32": 32}
_BITS |= {"bfloat16": 16, "float16": 16, "int16": 16, "uint16": 16}


@dataclass(frozen=True)
class TensorSpec:
    """The dtype and the shape of a tensor in a file; ``dtype`` is torch's name (``bfloat16``)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of such a tensor in bytes."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 8) // 8


class StoredTensor(ABC):
    """A tensor that can be read from files, as a whole or in pieces.

    ``spec`` is the shape of the tensor and the dtype that it is stored in when it is written again.
    ``read`` may return another dtype: a matrix that an algorithm rewrites is float32.
    """

    spec: TensorSpec

    @property
    @abstractmethod
    def paths(self) -> tuple[Path, ...]:
        """The files that the tensor is read from."""

    @property
    def nbytes(self) -> int:
        """The size in bytes of the tensor as ``spec`` describes it."""
        return self.spec.nbytes

    @property
    def location(self) -> str:
        """A line of text that names the tensor's place, and changes if the tensor is moved."""
        return " ".join(path.name for path in self.paths)

    @abstractmethod
    def read(self) -> Tensor:
        """Returns a copy of the tensor in memory."""

    def read_rows(self, rows: slice) -> Tensor:
        """Returns a copy of some rows; ``rows`` has a start and a stop on the first axis."""
        return self.read()[rows]

    @abstractmethod
    def chunks(self) -> Iterator[bytes]:
        """Yields the bytes to store, a few MiB at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """An open model folder. Its headers have been read and checked, its weights have not been read.

    ``config`` is config.json; ``tensors`` are by name.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def shards(self) -> list[Path]:
        """The files that contain tensors, in order of their names."""
        return sorted({path for tensor in self.tensors.values() for path in tensor.paths})

    def read(self, name: str) -> Tensor:
        """Returns a copy of the tensor called ``name`` in memory."""
        return self.tensors[name].read()

    def companions(self) -> list[Path]:
        """Returns the other files that a server reads: tokenizer, chat templates, Python code."""
        files = [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file() and not any(path.match(pattern) for pattern in _NOT_COPIED)
        ]
        templates = self.folder / "additional_chat_templates"
        return files + (sorted(templates.glob("*.jinja")) if templates.is_dir() else [])
