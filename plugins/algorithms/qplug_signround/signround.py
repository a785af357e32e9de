"""SignRound (Cheng et al., arXiv 2309.05516): rounding learned by the signs of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from qplug import Algorithm, Block, Linear, Param, QplugError, QuantizedWeight
from qplug.numerics import (
    SignSGD,
    fake_quantize,
    learn,
    learns_ranges,
    quantize,
    scale_of,
    start_clips,
    stretched,
)


@dataclass(frozen=True)
class Params:
    epochs: Annotated[int, Param("Passes over the calibration data.", 1)] = 6
    offset_lr: Annotated[
        float | None, Param("The first step of offsets; none: all steps add up to a half.", 0)
    ] = None
    range_lr: Annotated[
        float | None,
        Param(
            "The first step of ranges, relative; none: as offsets, and 0 for scales of two levels.",
            0,
            also=("minmax_lr",),
        ),
    ] = None
    aug_loss: Annotated[
        bool, Param("Match the float block on the same inputs too, not the float model alone.")
    ] = False
    dtype: Annotated[
        Literal["float32", "bfloat16"], Param("Dtype of the matrix products while learning.")
    ] = "float32"
    clip_steps: Annotated[int, Param("Steps of the clip search.", 1)] = 20
    clip_smallest: Annotated[float, Param("The smallest range, of the full one.", 0.05, 1)] = 0.6


class SignRound(Algorithm[Params]):
    """Learn which way each weight is rounded, so that whole blocks compute what they did."""

    name = "signround"
    Params = Params
    needs_data = True
    learns_blocks = True

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        params = self.params
        if block.reconstruction is None:
            raise QplugError("signround learns from calibration data, but this run has none")
        start_clips(block.groups, steps=params.clip_steps, smallest=params.clip_smallest)
        told = params.range_lr is not None
        learned = {
            # Scales of two levels have few codes, among which the search finds the best already.
            linear.name: _Rounding(linear, learns=told or not linear.args.two_level)
            for linear in block.linears
        }

        def weights() -> dict[str, Tensor]:
            return {f"{name}.weight": rounding.weight() for name, rounding in learned.items()}

        steps = params.epochs * block.reconstruction.steps
        # With rates that fall to 0, the steps of 1 / (steps + 1) add up to a half.
        lr = 1 / (steps + 1) if params.offset_lr is None else params.offset_lr
        range_lr = lr if params.range_lr is None else params.range_lr
        offsets = [rounding.offset for rounding in learned.values()]
        factors = [factor for rounding in learned.values() for factor in rounding.factors]
        optimizer = SignSGD(
            [
                {"params": offsets, "lr": lr, "low": -0.5, "high": 0.5},
                {"params": factors, "lr": range_lr, "low": 0.1, "high": 2.0},
            ],
            lr,
        )
        errors = learn(
            block.reconstruction,
            weights,
            [*offsets, *factors],
            optimizer,
            epochs=params.epochs,
            aim="both" if params.aug_loss else "model",
            precision=params.dtype,
            decay=True,
        )
        block.notes.append(
            f"{block.name}: output error {errors.before:.4g}, after learning {errors.after:.4g}"
        )
        return {name: rounding.codes() for name, rounding in learned.items()}


class _Rounding:
    """The tensors that are learned for one linear.

    ``offset: [out, in]``, in steps of the grid, is added before rounding. ``factors``: the low and
    the high end of the range (one factor if symmetric) relative to the start, ``args.scale_shape``;
    none if the range is not learned.
    """

    def __init__(self, linear: Linear, *, learns: bool) -> None:
        self._weight, self._args = linear.weight, linear.args
        self._global_scale = linear.global_scale
        scale, zero = scale_of(linear)
        self._scale, self._zero = scale, None if zero is None else zero.float()
        self.offset = torch.zeros_like(linear.weight, requires_grad=True)
        ends = (1 if linear.args.symmetric else 2) * (learns and learns_ranges(linear.args))
        self.factors = [torch.ones_like(scale, requires_grad=True) for _ in range(ends)]

    def weight(self) -> Tensor:
        """The rounded weight, with gradients."""
        return fake_quantize(self._weight, *self._range(), self._args, self.offset)

    @torch.no_grad()
    def codes(self) -> QuantizedWeight:
        args = self._args
        scale, zero = self._range()
        rounded = fake_quantize(self._weight, scale, zero, args, self.offset)
        return QuantizedWeight(
            quantize(rounded, scale, zero, args),
            scale,
            None if zero is None else zero.to(torch.uint8),
            args,
        )

    def _range(self) -> tuple[Tensor, Tensor | None]:
        if not self.factors:
            return self._scale, self._zero
        return stretched(self._scale, self._zero, self.factors, self._args, self._global_scale)
