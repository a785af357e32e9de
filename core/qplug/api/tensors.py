"""Tensors as files hold them, and the checkpoint that they make up."""

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

# Weights in other formats, files that a run writes itself, and what describes the source alone.
_LEFT_BEHIND = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack"),
    *("*.onnx", "*.index.json", "config.json", "qplug.json", "README.md", ".*"),
)
_BITS = {"float64": 64, "int64": 64, "uint64": 64, "float32": 32, "int32": 32, "uint32": 32}
_BITS |= {"bfloat16": 16, "float16": 16, "int16": 16, "uint16": 16}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (torch's name for it, such as ``bfloat16``) and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes that such a tensor takes."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 8) // 8


class StoredTensor(ABC):
    """A tensor that can be read from files, whole or in parts.

    ``spec`` has the dtype and the shape in which it is stored again.
    """

    spec: TensorSpec

    @property
    @abstractmethod
    def paths(self) -> tuple[Path, ...]:
        """The files that it is read from."""

    @property
    def nbytes(self) -> int:
        """The bytes that it takes when it is stored as ``spec`` says."""
        return self.spec.nbytes

    @property
    def location(self) -> str:
        """Where it lies, as a line that changes when the tensor is moved to another place."""
        return " ".join(path.name for path in self.paths)

    @abstractmethod
    def read(self) -> Tensor:
        """The tensor, in memory of its own."""

    def read_rows(self, rows: slice) -> Tensor:
        """Some rows of the tensor: ``rows`` has a start and a stop, within the first axis."""
        return self.read()[rows]

    @abstractmethod
    def chunks(self) -> Iterator[bytes]:
        """The bytes to store, a few MiB at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, opened: headers have been read and checked, no weight has.

    ``config`` is config.json; ``tensors`` are by name.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def shards(self) -> list[Path]:
        """The files that hold tensors, in order."""
        return sorted({path for tensor in self.tensors.values() for path in tensor.paths})

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``, in memory of its own."""
        return self.tensors[name].read()

    def companions(self) -> list[Path]:
        """The files a server reads beside weights and configuration: tokenizer, templates, code."""
        files = [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file() and not any(path.match(pattern) for pattern in _LEFT_BEHIND)
        ]
        templates = self.folder / "additional_chat_templates"
        return files + (sorted(templates.glob("*.jinja")) if templates.is_dir() else [])
