"""A checkpoint as an algorithm rewrote it: tensors are made anew as they are read, never all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qplug.api import Checkpoint, Preparation, Rewrite, StoredTensor, TensorSpec
from qplug.checkpoint.tensor_file import tensor_bytes
from qplug.errors import QplugError

#: Elements of a large tensor that are made at a time.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 25}


@dataclass(frozen=True)
class RewrittenTensor(StoredTensor):
    """A tensor that is made of others as it is read. ``spec`` is that of the first one.

    ``sources`` are in the order of ``rewrite.sources``; they may be rewritten themselves. It is
    made on ``device``, and stays there.
    """

    spec: TensorSpec
    name: str
    rewrite: Rewrite
    sources: tuple[StoredTensor, ...]
    device: torch.device

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(path for source in self.sources for path in source.paths))

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        A matrix is float32: it may go on to be quantized, and is not rounded in between. A vector,
        a norm or a bias, has the dtype and thus the values that are stored.
        """
        if len(self.spec.shape) < 2:
            return self._checked(self._made(slice(None))).to(self._dtype)
        made = torch.empty(self.spec.shape, device=self.device)
        for rows in self._pieces():
            made[rows] = self._made(rows)
        return self._checked(made)

    def chunks(self) -> Iterator[bytes]:
        """The bytes to store."""
        for rows in self._pieces():
            made = self._checked(self._made(rows)).to(self._dtype)
            yield bytes(tensor_bytes(made.cpu()))

    def read_rows(self, rows: slice) -> Tensor:
        """Some rows of the tensor, float32."""
        return self._made(rows) if self.rewrite.by_row else self.read()[rows]

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        return dtype

    def _pieces(self) -> Iterator[slice]:
        """Rows to make at a time."""
        shape = self.spec.shape
        if not (self.rewrite.by_row and shape):
            yield slice(None)
            return
        most = _CHUNK.get(self.device.type, _CHUNK["cpu"])
        step = max(1, most // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            yield slice(start, min(start + step, shape[0]))

    def _made(self, rows: slice) -> Tensor:
        first = self.sources[0]
        main = first.read() if rows == slice(None) else first.read_rows(rows)
        values = [main, *(source.read() for source in self.sources[1:])]
        made = self.rewrite.make(*(value.to(self.device).float() for value in values))
        if made.shape != main.shape or made.dtype != torch.float32:
            raise ValueError(f"{self.name}: was made {made.dtype} {list(made.shape)}")
        return made

    def _checked(self, made: Tensor) -> Tensor:
        if not torch.isfinite(made).all():
            raise QplugError(f"{self.name}: has NaN or infinite values, or is rewritten to such")
        return made


def rewritten(checkpoint: Checkpoint, preparation: Preparation, device: torch.device) -> Checkpoint:
    """``checkpoint`` with the tensors and the configuration that ``preparation`` gives it."""
    held = dict(checkpoint.tensors)
    for name, rewrite in preparation.rewrites.items():
        sources = tuple(checkpoint.tensors[source] for source in rewrite.sources)
        held[name] = RewrittenTensor(sources[0].spec, name, rewrite, sources, device)
    config = {**checkpoint.config, **preparation.config}
    return replace(checkpoint, config=config, tensors=held)


def rewritten_names(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that are made anew."""
    return tuple(n for n in names if isinstance(checkpoint.tensors.get(n), RewrittenTensor))


def apply(preparation: Preparation, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of ``tensors``, rewritten at once: what a small model can do."""
    made = {
        name: rewrite.make(*(tensors[source] for source in rewrite.sources))
        for name, rewrite in preparation.rewrites.items()
    }
    return {**tensors, **made}
