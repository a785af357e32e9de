"""QuaRot (Ashkboos et al., arXiv 2404.00456), as far as it can be put into the weights.

How a model is rewritten in another basis is told in ``qplug.turning``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from qplug import Algorithm, FloatModel, Heads, Param, Preparation, QplugError, Stream
from qplug.hadamard import exists
from qplug.rotation import Hadamard, KeepingMean, Random, Rotation
from qplug.turning import turned


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
        turn = self._rotation(stream.width)
        if stream.centred:  # a norm that subtracts the mean finds it where it was
            turn = KeepingMean(turn)
        heads = stream.heads if self.params.heads else ()
        by_size = {size: self._rotation(size) for size in sorted({each.size for each in heads})}
        turns = {each.values: by_size[each.size] for each in heads}
        online = self._online(model, heads) if self.params.online else ()
        made = turned(stream, turn, turns, online)
        return replace(made, notes=self._notes(stream, online))

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
        outputs = {each.output for each in heads}
        found = []
        for name, facing in model.stream.tensors.items():
            linear = name.removesuffix(".weight")
            if facing.norm is None and name not in outputs and linear in model.view.quantizable:
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
