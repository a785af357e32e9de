"""A float model in a rotated basis: rewrites of all tensors that face the residual stream.

With ``x' = x Q`` for the residual stream ``x`` and an orthogonal ``Q``, a norm without a weight
gives ``norm(x') = norm(x) Q``. So weights ``g`` of norms are folded into the linears behind them,
``W <- W diag(g) Q``, and tensors that write into the stream are rotated, ``W <- Qᵀ W``. Values are
rotated head by head, and the output projection with them (QuaRot, arXiv 2404.00456, section 4,
stages 1a and 1c; R1 and R2 of SpinQuant, arXiv 2405.16406).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qplug.api import Preparation, Rewrite, Stream, StreamAxis, StreamNorm, ValueHeads
from qplug.errors import QplugError
from qplug.numerics.hadamard import hadamard_transform
from qplug.numerics.rotation import KeepingMean, Rotation


def rotations(
    stream: Stream, make: Callable[[int], Rotation], *, heads: bool
) -> tuple[Rotation, dict[str, Rotation]]:
    """Rotations for ``rotated_model``: of the stream, and of value heads by tensor of values.

    ``make`` returns a rotation of a given size. Without ``heads`` no values are rotated.
    """
    turn = make(stream.width)
    if stream.centred:  # norms that subtract the mean need it in its place
        turn = KeepingMean(turn)
    rotated = stream.heads if heads else ()
    by_size = {size: make(size) for size in sorted({head.size for head in rotated})}
    return turn, {head.values: by_size[head.size] for head in rotated}


def rotated_model(
    stream: Stream,
    turn: Rotation,
    heads: Mapping[str, Rotation],
    online: Collection[str] = (),
) -> Preparation:
    """The model with its residual stream rotated by ``turn``; each tensor is rewritten on its own.

    ``turn`` must keep the mean if ``stream.centred``. ``heads``: the rotation of each value head,
    by the tensor of values; heads of other tensors stay. ``online``: linears whose inputs are
    rotated while the model runs. The rewrites are differentiable if the rotations are. Raises
    QplugError if no norm of the stream is read by linears.
    """
    if not stream.norms:
        raise QplugError(
            "linears read no norm of this model's residual stream, so it cannot be rotated"
        )
    values = {head.values: head for head in stream.heads if head.values in heads}
    outputs = {head.output: heads[name] for name, head in values.items()}
    rewrites: dict[str, Rewrite] = {}
    for norm in stream.norms.values():
        rewrites |= _norm_rewrites(norm, _folds_bias(norm, stream), turn)
    for name, stream_axis in stream.tensors.items():
        value_heads = values.get(name)
        make = RotatedTensor(
            stream_axis.axis,
            turn,
            offset=stream.norms[stream_axis.norm].offset if stream_axis.norm else None,
            rows=value_heads.rows if value_heads else None,
            heads=heads[name] if value_heads else outputs.get(name),
            online=name.removesuffix(".weight") in online,
        )
        norm_weight = (stream.norms[stream_axis.norm].weight,) if stream_axis.norm else ()
        source = stream.copies.get(name, name)
        # A rotation of a row's input leaves the other rows alone.
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
    """Makes a tensor whose ``axis`` is the rotated residual stream.

    ``offset``: of the norm whose weight is folded in, None if none is. ``heads`` rotates value
    heads: the ``rows`` of values, or the columns if ``rows`` is None. ``online``: the tensor's
    input is rotated while the model runs.
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
    """Rotate the heads in ``rows: [heads, size]`` of ``tensor: [out, ...]``."""
    rows = rows.to(tensor.device)
    turned = tensor.clone()
    turned[rows] = heads.along(tensor[rows], 1)
    return turned


# --- norms and biases ----------------------------------------------------------------------------


def _folds_bias(norm: StreamNorm, stream: Stream) -> bool:
    """Whether all readers of ``norm`` can take its bias; if not, the bias stays in the norm."""
    return all(stream.tensors[reader].bias is not None for reader in norm.readers)


def _norm_rewrites(norm: StreamNorm, folds: bool, turn: Rotation) -> dict[str, Rewrite]:
    """Rewrites of a norm to one that multiplies by 1; a bias that stays becomes ``(b / g) Q``."""

    def plain(weight: Tensor) -> Tensor:
        return torch.full_like(weight, 1 - norm.offset)

    def kept(bias: Tensor, weight: Tensor) -> Tensor:
        weight = weight + norm.offset
        if ((weight == 0) & (bias != 0)).any():
            raise QplugError(
                f"{norm.bias}: has a bias where the weight is zero, so the model cannot be rotated"
            )
        return turn.turn(bias / torch.where(weight == 0, torch.ones_like(weight), weight))

    rewrites = {norm.weight: Rewrite((norm.weight,), plain)}
    if norm.bias is not None and folds:
        rewrites[norm.bias] = Rewrite((norm.bias,), torch.zeros_like)
    elif norm.bias is not None:
        rewrites[norm.bias] = Rewrite((norm.bias, norm.weight), kept)
    return rewrites


def _bias_rewrites(
    stream: Stream, values: Mapping[str, ValueHeads], turns: Mapping[str, Rotation]
) -> dict[str, Rewrite]:
    """Rewrites of biases of readers: they take the norm's bias, and are rotated with the values."""
    rewrites = {}
    for name, stream_axis in stream.tensors.items():
        if stream_axis.norm is None or stream_axis.bias is None:
            continue
        norm, heads = stream.norms[stream_axis.norm], values.get(name)
        folds = norm.bias is not None and _folds_bias(norm, stream)
        if not folds and heads is None:
            continue
        rows, turn = (heads.rows, turns[name]) if heads else (None, None)
        make = RotatedBias(stream_axis, rows, turn)
        more = (name, norm.bias) if folds and norm.bias is not None else ()
        rewrites[stream_axis.bias] = Rewrite((stream_axis.bias, *more), make)
    return rewrites


@dataclass(frozen=True)
class RotatedBias:
    """Makes the bias of a linear that takes over the bias ``c`` of its norm: ``b + W c``."""

    stream_axis: StreamAxis
    rows: Tensor | None
    heads: Rotation | None

    def __call__(
        self, bias: Tensor, weight: Tensor | None = None, offset: Tensor | None = None
    ) -> Tensor:
        if weight is not None and offset is not None:
            bias = bias + torch.tensordot(offset, weight, ([0], [self.stream_axis.axis]))
        if self.rows is not None and self.heads is not None:
            bias = _turn_rows(bias, self.rows, self.heads)
        return bias
