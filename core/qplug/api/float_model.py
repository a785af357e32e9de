"""A float model, and how algorithms rewrite it before it is quantized."""

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
    """A norm of the residual stream whose output only linears read.

    The norm multiplies by ``offset`` (0, or 1 in Gemma) plus the tensor ``weight``, and adds the
    tensor ``bias``. ``readers``: the weights of the linears.
    """

    weight: str
    bias: str | None
    offset: float
    readers: tuple[str, ...]


@dataclass(frozen=True)
class StreamAxis:
    """The axis of a tensor along which it writes the residual stream, or reads a norm of it.

    ``axis`` is counted from 0. ``norm``: the name of the norm that the tensor reads; None for
    tensors that write (embeddings, output projections and their biases). ``bias``: the bias of a
    reading linear, which can take an offset of its input; None if it has none.
    """

    axis: int
    norm: str | None
    bias: str | None = None


@dataclass(frozen=True)
class ValueHeads:
    """Heads of values that only one projection reads, so each head can be rotated.

    ``rows``, int64 ``[heads, size]``: the rows of the tensor ``values`` (and the elements of its
    ``bias``) that make each head. The columns of the tensor ``output`` are heads of the same
    ``size``, in order.
    """

    values: str
    bias: str | None
    rows: Tensor
    output: str
    size: int


@dataclass(frozen=True)
class Stream:
    """The tensors that write or read the residual stream of a model, by name on disk.

    ``width``: of the stream. ``centred``: whether norms subtract the mean. ``copies``: the source
    of each tensor that has to be stored in addition: a head that was tied to the embedding, since a
    rewrite of one would change both.
    """

    width: int
    centred: bool
    norms: Mapping[str, StreamNorm]
    tensors: Mapping[str, StreamAxis]
    heads: tuple[ValueHeads, ...]
    copies: Mapping[str, str]


@dataclass(frozen=True)
class FloatModel:
    """A checkpoint to rewrite. ``tensors``: dtypes and shapes of all its tensors, by name.

    ``learned``: the result of ``Algorithm.learn_rewrite``; None while nothing has been learned.
    """

    view: ModelView
    tensors: Mapping[str, TensorSpec]
    stream: Stream
    learned: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Rewrite:
    """A function that makes a tensor from tensors of the checkpoint.

    ``make`` takes the tensors named in ``sources``, in float32, and returns the new tensor in
    float32; it is shaped like the first source, and stored in its dtype. ``by_row``: row ``r`` of
    the result depends on no other row of the first source, so large tensors are made by rows.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    by_row: bool = False


@dataclass(frozen=True)
class Preparation:
    """Rewrites of a float model that leave its outputs unchanged.

    ``rewrites``: by name of the tensor to make; names that the checkpoint lacks are added.
    ``config``: fields of config.json with new values. ``online``: linears whose inputs are
    multiplied by the Hadamard matrix of their width (``qplug.numerics.hadamard_transform``) while
    the model runs, which no engine does. ``notes``: messages for the user.
    """

    rewrites: Mapping[str, Rewrite]
    config: Mapping[str, Any] = field(default_factory=dict)
    online: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class WholeModel(ABC):
    """The whole float model in memory, computed as a preparation rewrites it.

    Algorithms learn on it. Activations are kept for one block at a time.
    """

    #: The number of batches of calibration samples.
    count: int
    #: Where the model computes.
    device: torch.device

    @abstractmethod
    def loss(self, preparation: Preparation, batch: int, *, weights: bool = False) -> Tensor:
        """The divergence of the rounded model's predictions from the float model's: float32 ``[]``.

        The mean of ``KL(float || rounded)`` of the next token, in nats, over the real tokens of
        batch ``batch``. The model is rewritten by ``preparation``, and the inputs of its linears
        are rounded as their schemes say; ``weights`` also rounds the weights, to nearest. Computes
        in float32, unless ``torch.autocast`` is active. Gradients reach the tensors that the
        rewrites are made of, straight through rounding, and through the peaks that determine
        scales.
        """
