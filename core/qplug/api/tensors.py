"""Tensors in files, and the checkpoint that contains them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
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
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json"),
)
_CHUNK = 1 << 26  # bytes of a computed tensor that are made at once
_BITS = {"float64": 64, "int64": 64, "uint64": 64, "float32": 32, "int32": 32, "uint32": 32}
_BITS |= {"bfloat16": 16, "float16": 16, "int16": 16, "uint16": 16}


@dataclass(frozen=True)
class TensorSpec:
    """The dtype and the shape of a tensor in a file; ``dtype`` is torch's name (``bfloat16``)."""

    dtype: str
    shape: tuple[int, ...]

    @cached_property
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

    def leaves(self) -> Iterator[StoredTensor]:
        """Yields the tensors in files that this tensor is computed from; itself by default."""
        yield self

    @abstractmethod
    def read(self) -> Tensor:
        """Returns a copy of the tensor in memory."""

    def read_rows(self, rows: slice) -> Tensor:
        """Returns a copy of some rows; ``rows`` has a start and a stop on the first axis."""
        return self.read()[rows]

    @abstractmethod
    def chunks(self) -> Iterator[bytes]:
        """Yields the bytes to store, a few MiB at a time."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ComputedTensor(StoredTensor):
    """A tensor that is computed from tensors in files, each time that it is read.

    ``parts``: the tensors in files, by names that ``make`` knows. ``make`` takes their values by
    the same names and returns the tensor in any float dtype; ``read`` rounds it to the dtype of
    ``spec``. ``by_row``: the parts whose rows, on the first axis, are those of the tensor; if there
    are any, some rows are made of those rows, and of the other parts as a whole.
    """

    spec: TensorSpec
    parts: Mapping[str, StoredTensor]
    make: Callable[[Mapping[str, Tensor]], Tensor]
    by_row: frozenset[str] = frozenset()

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(path for part in self.parts.values() for path in part.paths))

    @property
    def location(self) -> str:
        return " ".join(part.location for part in self.parts.values())

    def leaves(self) -> Iterator[StoredTensor]:
        for part in self.parts.values():
            yield from part.leaves()

    def values(self) -> dict[str, Tensor]:
        """Returns the values of ``parts``, read from files."""
        return {name: part.read() for name, part in self.parts.items()}

    def read(self) -> Tensor:
        return self._rounded(self.make(self.values()))

    def read_rows(self, rows: slice) -> Tensor:
        if not self.by_row:
            return self.read()[rows]
        return self._rounded(
            self.make(
                {
                    name: part.read_rows(rows) if name in self.by_row else part.read()
                    for name, part in self.parts.items()
                }
            )
        )

    def chunks(self) -> Iterator[bytes]:
        import torch

        count = self.spec.shape[0] if self.by_row and self.spec.shape else 1
        step = max(1, count * _CHUNK // max(1, self.nbytes))
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            piece = self.read_rows(rows) if self.by_row else self.read()
            yield piece.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    def _rounded(self, value: Tensor) -> Tensor:
        import torch

        return value.to(getattr(torch, self.spec.dtype))


@dataclass(frozen=True)
class Checkpoint:
    """An open model folder. Its headers have been read and checked, its weights have not been read.

    ``config`` is config.json; ``tensors`` are by name. ``quantized`` says in words how the files
    store weights if a reader reads them as float; then ``config`` and ``tensors`` are those of the
    float model. It is empty for a folder that is read as it is. ``transposed``: the names of the
    matrices that the files have as ``[in, out]``; ``tensors`` has them as ``[out, in]``.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    quantized: str = ""
    transposed: frozenset[str] = frozenset()

    @property
    def shards(self) -> list[Path]:
        """The files that contain tensors, in order of their names."""
        return sorted({path for tensor in self.tensors.values() for path in tensor.paths})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return {name: tensor.spec.shape for name, tensor in self.tensors.items()}

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
