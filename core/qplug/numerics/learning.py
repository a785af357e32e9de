"""Learning what a float block does: the loop that algorithms share (public)."""

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

#: The dtype of a block's matrix products while it is learned; all else is float32.
Precision = Literal["float32", "bfloat16"]

#: Batches on which it is judged whether what has been learned is better.
_JUDGED = 8


@dataclass(frozen=True)
class Learned:
    """Mean square errors of a block's output, before and after."""

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
    """Fit the ``learned`` tensors, in place, so that the block computes what it is to.

    ``values`` makes parameters of the block of them, and is differentiable. After each epoch the
    error is measured on some of the batches, the same ones each time, spread over the data; what
    was best, or the start, is kept. After ``patience`` epochs without a better one it ends. With
    ``decay`` the rates of ``optimizer`` fall to 0 in even steps. All processes learn the same.
    Raises QplugError if the error is not finite to begin with.
    """
    steps, judged = reconstruction.steps, min(_JUDGED, reconstruction.steps)
    among = [number * steps // judged for number in range(judged)]
    rates = [group["lr"] for group in optimizer.param_groups]

    def error_on(batch: Batch) -> Tensor:
        device = batch.inputs.device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            output = reconstruction.compute(made, batch)
        return batch.error(output)

    def judge() -> float:
        total = sum(
            (error_on(batch) for batch in reconstruction.batches(aim, among)), torch.zeros(())
        )
        reconstruction.total([total])
        return float(total) / judged

    with torch.no_grad():
        made = values()
        before = best = judge()
    if not math.isfinite(before):
        raise QplugError("what the quantized block computes is not finite")
    kept = [tensor.detach().clone() for tensor in learned]
    waited = 0
    for epoch in range(epochs):
        for number, batch in enumerate(reconstruction.batches(aim)):
            if decay:
                left = 1 - (epoch * steps + number) / (epochs * steps)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * left
            optimizer.zero_grad(set_to_none=True)
            made = values()
            error_on(batch).backward()
            for tensor in learned:  # an expert that saw no token here may have seen one elsewhere
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
            reconstruction.total([tensor.grad for tensor in learned if tensor.grad is not None])
            optimizer.step()
        with torch.no_grad():
            made = values()
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
    """Steps of one length, in the direction that the sign of the gradient tells.

    Values stay within ``low`` and ``high``, which groups of parameters can have of their own.
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
    """Whether scales of weights can be learned one by one.

    That of a whole tensor is to serve other tensors too, and powers of two have no near neighbours.
    """
    return args.strategy != "tensor" and args.scale_dtype != E8M0_SCALES


def start_clips(groups: Iterable[InputGroup], *, steps: int, smallest: float) -> None:
    """Search clips, of fewer than 8 bits, where no algorithm has chosen any: ranges to begin at."""
    for part in (part for group in groups for part in group.parts if part.tokens):
        for linear in part.linears:
            if linear.scale is None and linear.args.bits < 8:
                search_clip(linear, part.gram, steps=steps, smallest=smallest)
