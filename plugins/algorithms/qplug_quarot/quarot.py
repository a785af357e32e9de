"""QuaRot (Ashkboos et al., arXiv 2404.00456), as far as it can be put into the weights.

``qplug.numerics.rotated_model`` rewrites the model in the rotated basis.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from qplug import Algorithm, FloatModel, Param, Preparation, QplugError, Stream
from qplug.numerics import (
    HadamardRotation,
    RandomRotation,
    Rotation,
    hadamard_exists,
    rotated_model,
    rotations,
)


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
            "Rotate the inputs of down projections (R4) while the model runs, to measure it; no "
            "engine does. Queries and keys (R3) are not rotated: no scheme rounds them.",
            also=("online_rotate",),
        ),
    ] = False
    seed: Annotated[int, Param("Seed of the rotations.", 0)] = 0


class QuaRot(Algorithm[Params]):
    """Rotate the residual stream, so that no channel stands out."""

    name = "quarot"
    Params = Params

    @property
    def decides(self) -> frozenset[str]:
        return frozenset({"the rotation of the stream"})

    def prepare(self, model: FloatModel) -> Preparation:
        """Rotate all tensors that write or read the residual stream."""
        stream = model.stream
        turn, heads = rotations(stream, self._rotation, heads=self.params.heads)
        online = self._online(model, heads) if self.params.online else ()
        rotated = rotated_model(stream, turn, heads, online)
        return replace(rotated, notes=self._notes(stream, online))

    def _rotation(self, size: int) -> Rotation:
        if self.params.rotation == "random":
            return RandomRotation(size, self.params.seed)
        if not hadamard_exists(size):
            raise QplugError(
                f"no rule gives a Hadamard matrix of width {size}; use -o quarot.rotation=random"
            )
        return HadamardRotation(size, self.params.seed)

    def _online(self, model: FloatModel, heads: Collection[str]) -> tuple[str, ...]:
        """The linears that write into the stream and do not read rotated heads."""
        outputs = {each.output for each in model.stream.heads if each.values in heads}
        linears = []
        for name, axis in model.stream.tensors.items():
            linear = name.removesuffix(".weight")
            if axis.norm is None and name not in outputs and linear in model.view.quantizable:
                width = model.view.linears[linear][1]
                if not hadamard_exists(width):
                    raise QplugError(
                        f"{linear}: no rule gives a Hadamard matrix of width {width}; "
                        "leave out -o quarot.online"
                    )
                linears.append(linear)
        return tuple(linears)

    def _notes(self, stream: Stream, online: tuple[str, ...]) -> tuple[str, ...]:
        notes = []
        if online:
            notes.append(
                f"quarot: inputs of {len(online)} linears are rotated while the model runs, which "
                "only qplug does"
            )
        if stream.copies:
            notes.append(
                "quarot: the head is no longer tied to the embedding; it is stored in addition"
            )
        if self.params.heads and not stream.heads:
            notes.append("quarot: found no heads of values to rotate, only the stream")
        return tuple(notes)
