"""A float model in another basis: each tensor that faces the residual stream made anew (public).

With ``x' = x Q`` for the residual stream ``x`` and an orthogonal ``Q``, a norm without a weight
gives ``norm(x') = norm(x) Q``. So weights of norms go into the linears behind them,
``W <- W diag(g) Q``, and what writes into the stream is turned, ``W <- Qᵀ W``. Values are turned
head by head, and the output projection with them (QuaRot, arXiv 2404.00456, section 4, stages 1a
and 1c; R1 and R2 of SpinQuant, arXiv 2405.16406).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qplug.api import Facing, Heads, Preparation, Rewrite, Stream, StreamNorm
from qplug.errors import QplugError
from qplug.numerics.hadamard import hadamard_transform
from qplug.numerics.rotation import KeepingMean, Rotation


def rotations(
    stream: Stream, make: Callable[[int], Rotation], *, heads: bool
) -> tuple[Rotation, dict[str, Rotation]]:
    """What ``turned`` is given: of the stream, and of each head of values if ``heads``.

    ``make`` gives a rotation of a size.
    """
    turn = make(stream.width)
    if stream.centred:  # a norm that subtracts the mean finds it where it was
        turn = KeepingMean(turn)
    found = stream.heads if heads else ()
    by_size = {size: make(size) for size in sorted({each.size for each in found})}
    return turn, {each.values: by_size[each.size] for each in found}


def rotated_model(
    stream: Stream,
    turn: Rotation,
    heads: Mapping[str, Rotation],
    online: Collection[str] = (),
) -> Preparation:
    """The model with its stream turned by ``turn``: all tensors that face it, each on its own.

    ``turn`` keeps the mean where ``stream.centred``. ``heads``: how each head of values is turned,
    by the name of the tensor that makes them; others stay. What linears in ``online`` read is
    rotated as the model runs. The rewrites can be differentiated, if the rotations can. Raises
    QplugError if no norm is there to fold.
    """
    if not stream.norms:
        raise QplugError("no norm of the residual stream that linears read was found")
    values = {each.values: each for each in stream.heads if each.values in heads}
    outputs = {each.output: heads[name] for name, each in values.items()}
    rewrites: dict[str, Rewrite] = {}
    for norm in stream.norms.values():
        rewrites |= _norm_rewrites(norm, _folds_bias(norm, stream), turn)
    for name, facing in stream.tensors.items():
        made = values.get(name)
        make = RotatedTensor(
            facing.axis,
            turn,
            offset=stream.norms[facing.norm].offset if facing.norm else None,
            rows=made.rows if made else None,
            heads=heads[name] if made else outputs.get(name),
            online=name.removesuffix(".weight") in online,
        )
        norm_weight = (stream.norms[facing.norm].weight,) if facing.norm else ()
        source = stream.copies.get(name, name)
        # A turn of what a row reads leaves the other rows alone.
        rewrites[name] = Rewrite((source, *norm_weight), make, by_row=make.by_row)
    rewrites |= _bias_rewrites(stream, values, heads)
    rewrites |= {
        name: Rewrite((source,), torch.clone, by_row=True)
        for name, source in stream.copies.items()
        if name not in rewrites
    }
    config = {"tie_word_embeddings": False} if stream.copies else {}
    return Preparation(rewrites, config=config, online=tuple(online))


@dataclass(frozen=True)
class RotatedTensor:
    """A tensor with ``axis`` in the turned stream.

    ``offset`` is that of the norm whose weight is folded in, if one is. ``heads`` turns heads: the
    ``rows`` of values, or else the columns. ``online``: columns read what is rotated as it runs.
    """

    axis: int
    turn: Rotation
    offset: float | None = None
    rows: Tensor | None = None
    heads: Rotation | None = None
    online: bool = False

    @property
    def by_row(self) -> bool:
        return self.axis == 1 and self.rows is None

    def __call__(self, tensor: Tensor, norm: Tensor | None = None) -> Tensor:
        if norm is not None and self.offset is not None:
            shape = [-1 if axis == self.axis else 1 for axis in range(tensor.ndim)]
            tensor = tensor * (norm + self.offset).view(shape)
        tensor = self.turn.along(tensor, self.axis)
        if self.heads is not None and self.rows is not None:
            tensor = _turn_rows(tensor, self.rows, self.heads)
        elif self.heads is not None:
            tensor = self.heads.turn(tensor.unflatten(1, (-1, self.heads.size))).flatten(1)
        return hadamard_transform(tensor) if self.online else tensor


def _turn_rows(tensor: Tensor, rows: Tensor, heads: Rotation) -> Tensor:
    """Turn heads that are ``rows: [heads, size]`` of ``tensor``: ``[out, ...]``."""
    rows = rows.to(tensor.device)
    turned = tensor.clone()
    turned[rows] = heads.along(tensor[rows], 1)
    return turned


# --- norms and biases ----------------------------------------------------------------------------


def _folds_bias(norm: StreamNorm, stream: Stream) -> bool:
    """Whether all that read ``norm`` can take its bias; else it stays in the norm."""
    return all(stream.tensors[reader].bias is not None for reader in norm.readers)


def _norm_rewrites(norm: StreamNorm, folds: bool, turn: Rotation) -> dict[str, Rewrite]:
    """A norm that multiplies by 1. A bias ``b`` that has to stay is ``(b / g) Q`` then."""

    def plain(weight: Tensor) -> Tensor:
        return torch.full_like(weight, 1 - norm.offset)

    def kept(bias: Tensor, weight: Tensor) -> Tensor:
        weight = weight + norm.offset
        if ((weight == 0) & (bias != 0)).any():
            raise QplugError(f"{norm.bias}: has a bias where the weight is zero; it cannot be kept")
        return turn.turn(bias / torch.where(weight == 0, torch.ones_like(weight), weight))

    rewrites = {norm.weight: Rewrite((norm.weight,), plain)}
    if norm.bias is not None and folds:
        rewrites[norm.bias] = Rewrite((norm.bias,), torch.zeros_like)
    elif norm.bias is not None:
        rewrites[norm.bias] = Rewrite((norm.bias, norm.weight), kept)
    return rewrites


def _bias_rewrites(
    stream: Stream, values: Mapping[str, Heads], turns: Mapping[str, Rotation]
) -> dict[str, Rewrite]:
    """Biases of what reads a norm: they take the norm's bias, and turn with the values."""
    rewrites = {}
    for name, facing in stream.tensors.items():
        if facing.norm is None or facing.bias is None:
            continue
        norm, heads = stream.norms[facing.norm], values.get(name)
        folds = norm.bias is not None and _folds_bias(norm, stream)
        if not folds and heads is None:
            continue
        rows, turn = (heads.rows, turns[name]) if heads else (None, None)
        make = RotatedBias(facing, rows, turn)
        more = (name, norm.bias) if folds and norm.bias is not None else ()
        rewrites[facing.bias] = Rewrite((facing.bias, *more), make)
    return rewrites


@dataclass(frozen=True)
class RotatedBias:
    """The bias of a linear that also gives what its norm's bias gave: ``b + W c``."""

    facing: Facing
    rows: Tensor | None
    heads: Rotation | None

    def __call__(
        self, bias: Tensor, weight: Tensor | None = None, offset: Tensor | None = None
    ) -> Tensor:
        if weight is not None and offset is not None:
            bias = bias + torch.tensordot(offset, weight, ([0], [self.facing.axis]))
        if self.rows is not None and self.heads is not None:
            bias = _turn_rows(bias, self.rows, self.heads)
        return bias
