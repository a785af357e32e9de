"""SpinQuant (Liu et al., arXiv 2405.16406): R1 and R2, learned and put into the weights.

R1 rotates the residual stream, and an R2 for each layer rotates the heads of its values; QuaRot
draws these at random. SpinQuant learns them by descent on the orthogonal matrices (section 3.2), on
the predictions of the whole model with rounded inputs and weights. The paper leaves weights float
if GPTQ follows (section 3.3): ``weights=false``. The loss is the divergence from the float model's
predictions, whose gradients are less noisy than those of the paper's cross-entropy with the text.
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

#: Batches on which the loss is measured to choose the best rotations.
_JUDGED = 8
#: How often that loss is measured during the descent.
_TIMES = 5


@dataclass(frozen=True)
class Params:
    steps: Annotated[int, Param("Steps of the descent, a batch each.", 1)] = 100
    lr: Annotated[float, Param("The angle of an axis in the first step, in radians.", 0, 1)] = 0.03
    momentum: Annotated[float, Param("Momentum of the descent.", 0, 0.99)] = 0.9
    heads: Annotated[bool, Param("Rotate the values of each head too (R2).")] = True
    weights: Annotated[bool, Param("Round weights too, to nearest, while learning.")] = True
    dtype: Annotated[
        Literal["float32", "bfloat16"], Param("Dtype of the matrix products while learning.")
    ] = "float32"
    seed: Annotated[int, Param("Seed of the rotations at the start.", 0)] = 0


class SpinQuant(Algorithm[Params]):
    """Learn the rotation of the residual stream in which the model loses least by rounding."""

    name = "spinquant"
    Params = Params
    needs_data = True

    @property
    def decides(self) -> frozenset[str]:
        return frozenset({"the rotation of the stream"})

    def refuses(self, schemes: Sequence[Scheme]) -> str | None:
        if any(scheme.activations is not None for scheme in schemes):
            return None
        return (
            f"learns from the errors of rounded inputs, but {schemes[0].name} does not round them; "
            "use quarot, which rotates without learning"
        )

    def prepare(self, model: FloatModel) -> Preparation:
        """Rotate by the learned matrices; by the start if nothing has been learned.

        Raises QplugError if the model has no head of words, as those that rank have none.
        """
        if model.view.head is None:
            raise QplugError(
                "spinquant learns from predictions of the next token, which this model does not "
                "make; take quarot, which rotates without learning"
            )
        stream, learned = model.stream, model.learned
        notes: tuple[str, ...] = ()
        if stream.copies:
            notes += (
                "spinquant: the head is no longer tied to the embedding; it is stored in addition",
            )
        turn, heads = self._start(stream)
        if learned is not None:
            turn, heads = (
                ExplicitRotation(learned["R1"]),
                {n: ExplicitRotation(learned[n]) for n in heads},
            )
            before, after = (float(loss) for loss in learned["losses"])
            notes += (
                "spinquant: divergence from the float model's predictions: "
                f"{before:.4g}, after learning {after:.4g}",
            )
        return replace(rotated_model(stream, turn, heads), notes=notes)

    def learn_rewrite(self, model: FloatModel, whole: WholeModel) -> Mapping[str, Tensor]:
        """The learned ``R1``, each R2 by its tensor of values, and ``losses`` before and after."""
        params, stream = self.params, model.stream
        turn, heads = self._start(stream)
        rotations_by_name = {"R1": turn, **heads}
        learned = {
            name: rotation.matrix().float().to(whole.device).requires_grad_()
            for name, rotation in rotations_by_name.items()
        }
        rotated = rotated_model(
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
                return whole.loss(rotated, batch, weights=params.weights)

        @torch.no_grad()
        def judge() -> float:
            count = min(_JUDGED, whole.count)
            among = [number * whole.count // count for number in range(count)]
            return sum(float(loss(batch)) for batch in among) / count

        before = best = judge()
        if not before < float("inf"):
            raise QplugError("the predictions with rounded inputs are not finite")
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
        """Rotations to start from: of the stream, and of heads by tensor of values."""

        def hadamard_or_random(size: int) -> Rotation:
            return (HadamardRotation if hadamard_exists(size) else RandomRotation)(
                size, self.params.seed
            )

        return rotations(stream, hadamard_or_random, heads=self.params.heads)
