"""A checkpoint that an algorithm rewrites: each tensor is rewritten as it is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qplug.api import Checkpoint, Preparation, Rewrite, StoredTensor, TensorSpec
from qplug.checkpoint.stacked import JoinedTensor
from qplug.checkpoint.tensor_file import tensor_bytes
from qplug.errors import QplugError

#: Elements of a large tensor that are rewritten at a time.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 25}


@dataclass(frozen=True)
class RewrittenTensor(StoredTensor):
    """A tensor that ``rewrite`` makes of ``sources`` as it is read.

    ``sources``: in the order of ``rewrite.sources``; they may be rewritten themselves. ``spec``: of
    the first source. The tensor is made on ``device``, and stays there.
    """

    spec: TensorSpec
    name: str
    rewrite: Rewrite
    sources: tuple[StoredTensor, ...]
    device: torch.device

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(path for source in self.sources for path in source.paths))

    def leaves(self) -> Iterator[StoredTensor]:
        for source in self.sources:
            yield from source.leaves()

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        A matrix is float32, so that it is not rounded before it is quantized. A vector (a norm or a
        bias) has the stored dtype, and so the stored values. Raises QplugError if it is not finite.
        """
        if len(self.spec.shape) < 2:
            return self._checked(self._make(slice(None))).to(self._dtype)
        tensor = torch.empty(self.spec.shape, device=self.device)
        for rows in self._pieces():
            tensor[rows] = self._make(rows)
        return self._checked(tensor)

    def chunks(self) -> Iterator[bytes]:
        """Yields the bytes to store. Raises QplugError if they are not finite."""
        for rows in self._pieces():
            piece = self._checked(self._make(rows)).to(self._dtype)
            yield bytes(tensor_bytes(piece.cpu()))

    def read_rows(self, rows: slice) -> Tensor:
        """Some rows of the tensor, float32."""
        return self._make(rows) if self.rewrite.by_row else self.read()[rows]

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        return dtype

    def _pieces(self) -> Iterator[slice]:
        """Yields the rows to make at a time."""
        shape = self.spec.shape
        if not (self.rewrite.by_row and shape):
            yield slice(None)
            return
        most = _CHUNK.get(self.device.type, _CHUNK["cpu"])
        step = max(1, most // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            yield slice(start, min(start + step, shape[0]))

    def _make(self, rows: slice) -> Tensor:
        """Some rows, float32. Raises ValueError if the rewrite returns another shape or dtype."""
        first = self.sources[0]
        main = first.read() if rows == slice(None) else first.read_rows(rows)
        values = [main, *(source.read() for source in self.sources[1:])]
        piece = self.rewrite.make(*(value.to(self.device).float() for value in values))
        if piece.shape != main.shape or piece.dtype != torch.float32:
            raise ValueError(
                f"{self.name}: its rewrite returned {piece.dtype} {list(piece.shape)}, "
                f"not float32 {list(main.shape)}"
            )
        return piece

    def _checked(self, values: Tensor) -> Tensor:
        if not torch.isfinite(values).all():
            raise QplugError(f"{self.name}: has NaN or infinite values, or is rewritten to such")
        return values


def rewritten(checkpoint: Checkpoint, preparation: Preparation, device: torch.device) -> Checkpoint:
    """``checkpoint`` with the rewrites and the configuration of ``preparation``.

    Tensors are made on ``device`` as they are read.
    """
    tensors = dict(checkpoint.tensors)
    for name, rewrite in preparation.rewrites.items():
        sources = tuple(checkpoint.tensors[source] for source in rewrite.sources)
        tensors[name] = RewrittenTensor(sources[0].spec, name, rewrite, sources, device)
    config = {**checkpoint.config, **preparation.config}
    text = config.get("text_config")
    if isinstance(text, dict):  # the configuration of a model with towers
        own = {key: value for key, value in preparation.config.items() if key in text}
        config["text_config"] = {**text, **own}
    return replace(checkpoint, config=config, tensors=tensors)


def rewritten_names(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[str, ...]:
    """The members of ``names`` whose tensors are rewritten."""
    return tuple(name for name in names if _is_rewritten(checkpoint.tensors.get(name)))


def _is_rewritten(tensor: StoredTensor | None) -> bool:
    if isinstance(tensor, JoinedTensor):
        return any(_is_rewritten(part) for part in tensor.tensors())
    return isinstance(tensor, RewrittenTensor)


def apply(preparation: Preparation, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with all rewrites of ``preparation``, in memory at once: for small models."""
    rewritten_tensors = {
        name: rewrite.make(*(tensors[source] for source in rewrite.sources))
        for name, rewrite in preparation.rewrites.items()
    }
    return {**tensors, **rewritten_tensors}
