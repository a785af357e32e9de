"""SpinQuant (Liu et al., arXiv 2405.16406): R1 and R2, learned and put into the weights.

R1 turns the residual stream, an R2 for each layer turns the heads of its values: what QuaRot draws
at random. Learned they are by descent on the orthogonal matrices (section 3.2), on what the whole
model predicts with inputs and weights rounded. The paper leaves weights float where GPTQ follows
(section 3.3): ``weights=false``. The loss is the divergence from what the float model predicts,
whose gradients are less noisy than those of the paper's cross-entropy with the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from qplug import (
    Algorithm,
    FloatModel,
    Param,
    Preparation,
    QplugError,
    Scheme,
    Stream,
    WholeModel,
)
from qplug.numerics import (
    ExplicitRotation,
    HadamardRotation,
    RandomRotation,
    Rotation,
    hadamard_exists,
    rotated_model,
    rotations,
)
from qplug_spinquant.stiefel import CayleySGD, orthogonal

#: Batches on which it is judged whether what has been learned is better.
_JUDGED = 8
#: How often it is judged.
_TIMES = 5


@dataclass(frozen=True)
class Params:
    steps: Annotated[int, Param("Steps of the descent, a batch each.", 1)] = 100
    lr: Annotated[float, Param("How far the first step turns an axis, in radians.", 0, 1)] = 0.03
    momentum: Annotated[float, Param("Of the descent.", 0, 0.99)] = 0.9
    heads: Annotated[bool, Param("Rotate the values of each head too (R2).")] = True
    weights: Annotated[bool, Param("Round weights too, to nearest, while learning.")] = True
    dtype: Annotated[
        Literal["float32", "bfloat16"], Param("Of the matrix products while learning.")
    ] = "float32"
    seed: Annotated[int, Param("Of the rotations that it starts from.", 0)] = 0


class SpinQuant(Algorithm[Params]):
    """Learn the rotation of the residual stream in which the model loses least by rounding."""

    name = "spinquant"
    Params = Params
    needs_data = True

    @property
    def settles(self) -> frozenset[str]:
        return frozenset({"the rotation of the stream"})

    def refuses(self, schemes: Sequence[Scheme]) -> str | None:
        if any(scheme.activations is not None for scheme in schemes):
            return None
        return (
            f"learns from what is lost by rounding inputs, and {schemes[0].name} leaves them as "
            "they are; quarot rotates without learning"
        )

    def prepare(self, model: FloatModel) -> Preparation:
        """By the start, as long as nothing has been learned."""
        stream, learned = model.stream, model.learned
        notes: tuple[str, ...] = ()
        if stream.copies:
            notes += ("spinquant: the head is no longer tied to the embedding, but a tensor more",)
        turn, heads = self._start(stream)
        if learned is not None:
            turn, heads = (
                ExplicitRotation(learned["R1"]),
                {n: ExplicitRotation(learned[n]) for n in heads},
            )
            before, after = (float(loss) for loss in learned["losses"])
            notes += (
                "spinquant: divergence from the float model's predictions: "
                f"{before:.4g}, {after:.4g} once learned",
            )
        return replace(rotated_model(stream, turn, heads), notes=notes)

    def learn(self, model: FloatModel, whole: WholeModel) -> Mapping[str, Tensor]:
        """``R1``; R2 by the name of the tensor of values; ``losses``: before and after."""
        params, stream = self.params, model.stream
        turn, heads = self._start(stream)
        matrices = {"R1": turn, **heads}
        learned = {
            name: each.written().float().to(whole.device).requires_grad_()
            for name, each in matrices.items()
        }
        made = rotated_model(
            stream,
            ExplicitRotation(learned["R1"]),
            {name: ExplicitRotation(learned[name]) for name in heads},
        )
        fixed = torch.ones(stream.width, device=whole.device) if stream.centred else None
        optimizer = CayleySGD(
            [
                {"params": [learned["R1"]], "fixed": fixed},
                {"params": [learned[name] for name in heads]},
            ],
            params.lr,
            params.momentum,
        )

        def loss(batch: int) -> Tensor:
            kind = whole.device.type
            with torch.autocast(kind, torch.bfloat16, enabled=params.dtype == "bfloat16"):
                return whole.loss(made, batch, weights=params.weights)

        @torch.no_grad()
        def judge() -> float:
            count = min(_JUDGED, whole.count)
            among = [number * whole.count // count for number in range(count)]
            return sum(float(loss(batch)) for batch in among) / count

        before = best = judge()
        if not before < float("inf"):
            raise QplugError("what the model computes with rounded inputs is not finite")
        kept = {name: matrix.detach().clone() for name, matrix in learned.items()}
        order = torch.randperm(
            whole.count, generator=torch.Generator().manual_seed(params.seed)
        ).tolist()
        for step in range(params.steps):
            for group in optimizer.param_groups:
                group["lr"] = params.lr * (1 - step / params.steps)
            optimizer.zero_grad(set_to_none=True)
            loss(order[step % whole.count]).backward()
            optimizer.step()
            if (step + 1) * _TIMES // params.steps > step * _TIMES // params.steps:
                now = judge()
                if now < best:
                    best = now
                    kept = {name: matrix.detach().clone() for name, matrix in learned.items()}
        losses = torch.tensor([before, best])
        return {**{name: orthogonal(q).cpu() for name, q in kept.items()}, "losses": losses}

    def _start(self, stream: Stream) -> tuple[Rotation, dict[str, Rotation]]:
        """The rotation of the stream, and those of heads by the name of the tensor of values."""

        def hadamard_or_random(size: int) -> Rotation:
            return (HadamardRotation if hadamard_exists(size) else RandomRotation)(
                size, self.params.seed
            )

        return rotations(stream, hadamard_or_random, heads=self.params.heads)
