"""A float model that is rewritten before it is quantized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qplug.api.model import ModelView
from qplug.api.tensors import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class StreamNorm:
    """A norm of the residual stream that linears read, and nothing else.

    It multiplies by ``offset`` (0, or 1 in Gemma) plus the tensor ``weight``, and adds ``bias``.
    ``readers`` are the tensors that read it.
    """

    weight: str
    bias: str | None
    offset: float
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Facing:
    """One axis of a tensor is the residual stream: it writes into it, or reads a norm of it.

    ``axis`` is counted from 0. ``norm`` is the norm that is read; None for what writes: embeddings,
    output projections and their biases. ``bias`` takes an offset of what is read, if there is one.
    """

    axis: int
    norm: str | None
    bias: str | None = None


@dataclass(frozen=True)
class Heads:
    """Values that only meet one projection, so that each head can be turned.

    ``rows: [heads, size]`` (int64) are the rows of the tensor ``values`` (and places of its bias)
    that make a head; the columns of ``output`` are heads of the same ``size``, one after another.
    """

    values: str
    bias: str | None
    rows: Tensor
    output: str
    size: int


@dataclass(frozen=True)
class Stream:
    """What faces the residual stream of a model, by the names of tensors on disk.

    ``centred`` tells whether norms subtract the mean. ``copies`` are tensors that have to be made
    of others, by name, because the head is tied to the embedding: rewriting one would change both.
    """

    width: int
    centred: bool
    norms: Mapping[str, StreamNorm]
    tensors: Mapping[str, Facing]
    heads: tuple[Heads, ...]
    copies: Mapping[str, str]


@dataclass(frozen=True)
class FloatModel:
    """A checkpoint to be rewritten. ``tensors`` are those that it holds, by name.

    ``learned`` is what ``Algorithm.learn`` gave; None while nothing has been learned.
    """

    view: ModelView
    tensors: Mapping[str, TensorSpec]
    stream: Stream
    learned: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Rewrite:
    """How a tensor is made of tensors of the checkpoint.

    ``make`` takes the tensors named in ``sources``, in float32, and gives the new one in float32;
    it is shaped like the first, and stored in its dtype. ``by_row``: row ``r`` of the result needs
    row ``r`` of the first source and no other, so that a large one is made a few rows at a time.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    by_row: bool = False


@dataclass(frozen=True)
class Preparation:
    """A float model rewritten so that it computes what it did before.

    ``rewrites`` are by name; names that the checkpoint lacks are added. ``config`` are fields of
    config.json with other values. ``online`` are linears whose inputs are multiplied by the
    Hadamard matrix of their width (``qplug.numerics.transform``) as the model runs: no engine does.
    """

    rewrites: Mapping[str, Rewrite]
    config: Mapping[str, Any] = field(default_factory=dict)
    online: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class WholeModel(ABC):
    """The float model, all of it in memory, as a preparation would have it compute.

    For what is to be learned of the model as a whole. Activations are kept of one block at a time.
    """

    #: Batches of calibration samples that there are.
    count: int
    #: Where it is computed.
    device: torch.device

    @abstractmethod
    def loss(self, made: Preparation, batch: int, *, weights: bool = False) -> Tensor:
        """How far what the model predicts is from what the float one does: float32 ``[]``.

        The mean divergence ``KL(float || rounded)`` of the next token, in nats, over the real
        tokens of batch ``batch``. The model is rewritten by ``made``, and the inputs of its linears
        are rounded as their scheme says; with ``weights`` these are too, to nearest. It computes in
        float32, but for what ``torch.autocast`` around it takes to another dtype. Gradients reach
        whatever the rewrites are made of, straight through the rounding and through the peaks that
        scales are made of.
        """
