"""The training loop that algorithms share: a block learns to compute like the float one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qplug.api import Aim, Batch, InputGroup, Reconstruction
from qplug.api.scheme import E8M0_SCALES, QuantArgs
from qplug.errors import QplugError
from qplug.numerics.clipping import search_clip

#: The dtype of a block's matrix products during training; all else is float32.
Precision = Literal["float32", "bfloat16"]

#: Batches on which the error is measured after each epoch.
_JUDGED = 8


@dataclass(frozen=True)
class Learned:
    """Mean square errors of a block's output, before and after training."""

    before: float
    after: float


def learn(
    reconstruction: Reconstruction,
    values: Callable[[], Mapping[str, Tensor]],
    learned: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    aim: Aim = "model",
    precision: Precision = "float32",
    patience: int | None = None,
    decay: bool = False,
) -> Learned:
    """Train the ``learned`` tensors, in place, so that the block's output meets its target.

    ``values`` returns parameters of the block as a differentiable function of ``learned``. ``aim``:
    the target. After each epoch the error is measured on some of the batches, always the same, from
    all over the data; the tensors of least error, which may be those of the start, are kept.
    Training ends after ``epochs``, or after ``patience`` epochs without improvement. ``decay``: the
    rates of ``optimizer`` fall to 0 in even steps. All processes learn the same values. Raises
    QplugError if the error is not finite at the start.
    """
    steps, judged = reconstruction.steps, min(_JUDGED, reconstruction.steps)
    among = [number * steps // judged for number in range(judged)]
    rates = [group["lr"] for group in optimizer.param_groups]

    def error_on(batch: Batch) -> Tensor:
        device = batch.inputs.device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            output = reconstruction.compute(parameters, batch)
        return batch.error(output)

    def judge() -> float:
        total = sum(
            (error_on(batch) for batch in reconstruction.batches(aim, among)), torch.zeros(())
        )
        reconstruction.total([total])
        return float(total) / judged

    with torch.no_grad():
        parameters = values()
        before = best = judge()
    if not math.isfinite(before):
        raise QplugError("the output of the quantized block is not finite")
    kept = [tensor.detach().clone() for tensor in learned]
    waited = 0
    for epoch in range(epochs):
        for number, batch in enumerate(reconstruction.batches(aim)):
            if decay:
                left = 1 - (epoch * steps + number) / (epochs * steps)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * left
            optimizer.zero_grad(set_to_none=True)
            parameters = values()
            error_on(batch).backward()
            for tensor in learned:  # an expert without a token here may have one in another process
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
            reconstruction.total([tensor.grad for tensor in learned if tensor.grad is not None])
            optimizer.step()
        with torch.no_grad():
            parameters = values()
            now = judge()
            waited = 0 if now < best else waited + 1
            if now < best:
                best = now
                kept = [tensor.detach().clone() for tensor in learned]
        if patience is not None and waited >= patience:
            break
    with torch.no_grad():
        for tensor, value in zip(learned, kept, strict=True):
            tensor.copy_(value)
    return Learned(before, best)


class SignSGD(torch.optim.Optimizer):
    """Descent by ``lr`` times the sign of the gradient.

    Values stay between ``low`` and ``high``, which each group of parameters can set for itself.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        low: float = -torch.inf,
        high: float = torch.inf,
    ) -> None:
        super().__init__(params, {"lr": lr, "low": low, "high": high})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves each value that has a gradient; ``closure`` is not called."""
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    value.sub_(value.grad.sign_(), alpha=group["lr"])
                    value.clamp_(group["low"], group["high"])


def learns_ranges(args: QuantArgs) -> bool:
    """Whether the scales of weights can be learned.

    The scale of a whole tensor also has to serve the tensors that engines merge with it, and scales
    that are powers of two are too far apart.
    """
    return args.strategy != "tensor" and args.scale_dtype != E8M0_SCALES


def start_clips(groups: Iterable[InputGroup], *, steps: int, smallest: float) -> None:
    """Search clips of weights of fewer than 8 bits that have no scale yet, to start learning from.

    ``steps``, ``smallest``: as in ``search_clip``.
    """
    for part in (part for group in groups for part in group.by_tokens if part.tokens):
        for linear in part.linears:
            if linear.scale is None and linear.args.bits < 8:
                search_clip(linear, part.gram, steps=steps, smallest=smallest)
