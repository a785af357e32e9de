"""QuaRot (Ashkboos et al., arXiv 2404.00456), as far as it can be put into the weights.

With ``x' = x Q`` for the residual stream ``x`` and an orthogonal ``Q``, a norm without a weight
gives ``norm(x') = norm(x) Q``. So weights of norms go into the linears behind them,
``W <- W diag(g) Q``, and what writes into the stream is turned, ``W <- Qᵀ W`` (section 4, stage
1a). Values are turned head by head, and the output projection with them (stage 1c).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from qplug import (
    Algorithm,
    Facing,
    FloatModel,
    Heads,
    Param,
    Preparation,
    QplugError,
    Rewrite,
    Stream,
    StreamNorm,
)
from qplug.hadamard import exists, transform
from qplug_quarot.rotation import Hadamard, KeepingMean, Random, Rotation


@dataclass(frozen=True)
class Params:
    rotation: Annotated[
        Literal["hadamard", "random"],
        Param("A Hadamard matrix, or any orthogonal one.", also=("rotate_mode",)),
    ] = "hadamard"
    heads: Annotated[bool, Param("Rotate the values of each head too.")] = True
    online: Annotated[
        bool,
        Param(
            "Rotate what down projections read (R4) as the model runs, to measure it: no engine "
            "does. Queries and keys (R3) are left alone: no scheme rounds them.",
            also=("online_rotate",),
        ),
    ] = False
    seed: Annotated[int, Param("Of the rotations.", 0)] = 0


class QuaRot(Algorithm[Params]):
    """Rotate the residual stream, so that no channel stands out."""

    name = "quarot"
    Params = Params

    @property
    def settles(self) -> frozenset[str]:
        return frozenset({"the rotation of the stream"})

    def prepare(self, model: FloatModel) -> Preparation:
        """All tensors that face the stream, each made anew on its own."""
        stream = model.stream
        if not stream.norms:
            raise QplugError("no norm of the residual stream that linears read was found")
        turn = self._rotation(stream.width)
        if stream.centred:  # a norm that subtracts the mean finds it where it was
            turn = KeepingMean(turn)
        heads = stream.heads if self.params.heads else ()
        sizes = {each.size for each in heads}
        by_size = {size: self._rotation(size) for size in sorted(sizes)}
        values = {each.values: each for each in heads}
        outputs = {each.output: by_size[each.size] for each in heads}
        online = self._online(model, heads) if self.params.online else ()
        rewrites: dict[str, Rewrite] = {}
        for norm in stream.norms.values():
            rewrites |= _norm_rewrites(norm, _folds_bias(norm, stream), turn)
        for name, facing in stream.tensors.items():
            made = values.get(name)
            make = Turned(
                facing.axis,
                turn,
                offset=stream.norms[facing.norm].offset if facing.norm else None,
                rows=made.rows if made else None,
                heads=by_size[made.size] if made else outputs.get(name),
                online=name.removesuffix(".weight") in online,
            )
            norm_weight = (stream.norms[facing.norm].weight,) if facing.norm else ()
            source = stream.copies.get(name, name)
            # A turn of what a row reads leaves the other rows alone.
            rewrites[name] = Rewrite((source, *norm_weight), make, by_row=make.by_row)
        rewrites |= _bias_rewrites(stream, values, by_size)
        rewrites |= {
            name: Rewrite((source,), torch.clone, by_row=True)
            for name, source in stream.copies.items()
            if name not in rewrites
        }
        return Preparation(
            rewrites,
            config={"tie_word_embeddings": False} if stream.copies else {},
            online=online,
            notes=self._notes(stream, online),
        )

    def _rotation(self, size: int) -> Rotation:
        if self.params.rotation == "random":
            return Random(size, self.params.seed)
        if not exists(size):
            raise QplugError(
                f"no rule gives a Hadamard matrix of width {size}; say -o quarot.rotation=random"
            )
        return Hadamard(size, self.params.seed)

    def _online(self, model: FloatModel, heads: tuple[Heads, ...]) -> tuple[str, ...]:
        """The linears that write into the stream, but for those that heads are turned before."""
        turned = {each.output for each in heads}
        found = []
        for name, facing in model.stream.tensors.items():
            linear = name.removesuffix(".weight")
            if facing.norm is None and name not in turned and linear in model.view.quantizable:
                width = model.view.linears[linear][1]
                if not exists(width):
                    raise QplugError(
                        f"{linear}: no rule gives a Hadamard matrix of width {width}; "
                        "leave out -o quarot.online"
                    )
                found.append(linear)
        return tuple(found)

    def _notes(self, stream: Stream, online: tuple[str, ...]) -> tuple[str, ...]:
        notes = []
        if online:
            notes.append(
                f"quarot: inputs of {len(online)} linears are rotated as the model runs, which "
                "qplug does with this folder, and no one else"
            )
        if stream.copies:
            notes.append("quarot: the head is no longer tied to the embedding, but a tensor more")
        if self.params.heads and not stream.heads:
            notes.append("quarot: found no heads of values to rotate, only the stream")
        return tuple(notes)


@dataclass(frozen=True)
class Turned:
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
        return transform(tensor) if self.online else tensor


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
    stream: Stream, values: Mapping[str, Heads], by_size: Mapping[int, Rotation]
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
        rows, turn = (heads.rows, by_size[heads.size]) if heads else (None, None)
        make = Shifted(facing, rows, turn)
        more = (name, norm.bias) if folds and norm.bias is not None else ()
        rewrites[facing.bias] = Rewrite((facing.bias, *more), make)
    return rewrites


@dataclass(frozen=True)
class Shifted:
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
