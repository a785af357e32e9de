"""OmniQuant (Shao et al., arXiv 2308.13137): clips and scales learned block by block.

Learnable weight clipping (section 3.2) learns which part of each range to keep; learnable
equivalent transformation (section 3.3) learns scales and offsets of the inputs of linears. Both
start from the results of a search, or of earlier algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from qplug import Algorithm, Block, InputGroup, Linear, Param, QplugError, Reconstruction
from qplug.numerics import (
    fake_quantize,
    learn,
    learns_ranges,
    minmax_scale,
    range_scale_with_gradients,
    ranges_with_gradients,
    round_in_range,
    scale_of,
    scaling_error,
    start_clips,
    unclipped_ratio,
)

#: The widest range that can be learned, relative to one that clips nothing.
_WIDEST = 1.25


@dataclass(frozen=True)
class _Rates:
    """The first rate of AdamW, whose steps are about as long as their rates.

    All steps add up to ``reach``, so that runs of few steps get as far as runs of many, within the
    bounds of the first rate.
    """

    reach: float
    least: float
    most: float

    def first(self, steps: int) -> float:
        """The first of ``steps`` rates that fall to 0 evenly."""
        return min(max(2 * self.reach / (steps + 1), self.least), self.most)


#: Of the logits of clips, and of the logarithms of scales.
_OF_CLIPS, _OF_SCALES = _Rates(1.6, 0.01, 0.04), _Rates(0.8, 0.005, 0.02)


@dataclass(frozen=True)
class Params:
    lwc: Annotated[bool, Param("Learn clips of weights.")] = True
    let: Annotated[bool, Param("Learn scales of inputs.")] = True
    shift: Annotated[
        bool, Param("Learn offsets of inputs, where biases can take them.", also=("use_shift",))
    ] = True
    lwc_lr: Annotated[
        float | None,
        Param("The first step of clips; none: 0.01, up to 0.04 if there are few steps.", 0),
    ] = None
    let_lr: Annotated[
        float | None,
        Param(
            "The first step of scales and offsets; none: 0.005, up to 0.02 if there are few steps.",
            0,
        ),
    ] = None
    weight_decay: Annotated[float, Param("Weight decay of AdamW.", 0, also=("wd",))] = 0.0
    epochs: Annotated[int, Param("Passes over the calibration data, at most.", 1)] = 5
    patience: Annotated[
        int | None, Param("Passes without a better result before it stops; none: never.", 1)
    ] = None
    aug_loss: Annotated[
        bool, Param("Match the float block on the same inputs too, not the float model alone.")
    ] = False
    dtype: Annotated[
        Literal["float32", "bfloat16"], Param("Dtype of the matrix products while learning.")
    ] = "float32"
    alpha: Annotated[float, Param("The largest exponent of scales to begin at.", 0, 1)] = 0.5
    clip_steps: Annotated[int, Param("Steps of the clip search to begin at.", 1)] = 20
    clip_smallest: Annotated[
        float, Param("The smallest range to begin at, of the full one.", 0.05, 1)
    ] = 0.6

    def __post_init__(self) -> None:
        if not (self.lwc or self.let):
            raise QplugError("omniquant has nothing to learn: set lwc or let")


class OmniQuant(Algorithm[Params]):
    """Learn clips of weights and scales of inputs, so that whole blocks compute what they did."""

    name = "omniquant"
    Params = Params
    needs_data = True
    learns_blocks = True

    def transform(self, block: Block) -> None:
        params = self.params
        if block.reconstruction is None:
            raise QplugError("omniquant learns from calibration data, but this run has none")
        scalable = [group for group in block.groups if group.scalable] if params.let else []
        for group in scalable:
            # A new scale would drop the clips that an earlier algorithm chose along with its own.
            if all(linear.scale is None for linear in group.linears):
                self._start(block, group)
        start_clips(block.groups, steps=params.clip_steps, smallest=params.clip_smallest)
        moves = [_Move(group, shift=params.shift and group.shiftable) for group in scalable]
        clips = [_Clip(linear, learned=params.lwc) for linear in block.linears]
        of_moves = [tensor for move in moves for tensor in move.learned()]
        of_clips = [tensor for clip in clips for tensor in clip.learned()]
        if not (of_moves or of_clips):
            block.notes.append(f"{block.name}: has nothing that omniquant can learn")
            return
        steps = params.epochs * block.reconstruction.steps
        learning = _Learning(
            block, block.reconstruction, moves, clips, getattr(torch, params.dtype)
        )
        optimizer = torch.optim.AdamW(
            [
                {"params": tensors, "lr": lr}
                for tensors, lr in (
                    (of_clips, _first(params.lwc_lr, _OF_CLIPS, steps)),
                    (of_moves, _first(params.let_lr, _OF_SCALES, steps)),
                )
                if tensors
            ],
            weight_decay=params.weight_decay,
        )
        errors = learn(
            block.reconstruction,
            learning.values,
            [*of_moves, *of_clips],
            optimizer,
            epochs=params.epochs,
            aim="both" if params.aug_loss else "model",
            precision=params.dtype,
            patience=params.patience,
            decay=True,
        )
        learning.apply()
        block.notes.append(
            f"{block.name}: output error {errors.before:.4g}, after learning {errors.after:.4g}"
        )

    def _start(self, block: Block, group: InputGroup) -> None:
        """Give ``group`` the best of a few scales; no scale at all may be the best."""

        def error(scale: Tensor) -> float:
            return scaling_error(group, scale, steps=5, smallest=self.params.clip_smallest)

        best = min(self._candidates(block, group), key=error)
        if not bool((best == 1).all()):
            block.smooth(group, best)

    def _candidates(self, block: Block, group: InputGroup) -> Iterator[Tensor]:
        alpha = self.params.alpha
        yield torch.ones_like(group.mean_abs)
        weight = torch.stack([linear.weight.abs().amax(0) for linear in group.linears]).amax(0)
        peak = torch.maximum(group.high, -group.low)
        mean = group.mean_abs.clamp(min=1e-4)
        for scale in (
            mean.pow(alpha / 2),  # AWQ's
            mean.pow(alpha),
            peak.clamp(min=1e-5).pow(alpha)
            / weight.clamp(min=1e-5).pow(1 - alpha),  # SmoothQuant's
        ):
            yield block.shared(group, scale / (scale.max() * scale.min()).sqrt())


def _first(given: float | None, rates: _Rates, steps: int) -> float:
    return rates.first(steps) if given is None else given


class _Move:
    """Scales of a group's input, as logarithms, and offsets: ``[in]``."""

    def __init__(self, group: InputGroup, *, shift: bool) -> None:
        self.group = group
        self._log = torch.zeros_like(group.mean, requires_grad=True)
        self.offset = torch.zeros_like(group.mean, requires_grad=True) if shift else None

    def learned(self) -> list[Tensor]:
        return [self._log] if self.offset is None else [self._log, self.offset]

    def scale(self, block: Block) -> Tensor:
        return block.shared(self.group, self._log.exp())


class _Clip:
    """The parts of a weight's range that are kept at its low and its high end: ``scale_shape``.

    Symmetric weights have one part for both ends. A part is ``widest * sigmoid(logit)``. If scales
    cannot be learned, a weight that scale is moved into gets its full range.
    """

    def __init__(self, linear: Linear, *, learned: bool) -> None:
        self.linear = linear
        args = linear.args
        self._fixed = not learns_ranges(args)
        self._widest = _WIDEST * unclipped_ratio(args)
        part = scale_of(linear)[0] / minmax_scale(linear.weight, args)[0] / self._widest
        logit = torch.logit(part.clamp(0.01, 0.99))
        count = 1 if args.symmetric else 2
        self._logits = [logit.clone().requires_grad_(learned) for _ in range(count)]

    def learned(self) -> list[Tensor]:
        return [x for x in self._logits if x.requires_grad and not self._fixed]

    def weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` rounded, with gradients. ``dtype``: as in ``round_in_range``."""
        if self._fixed and weight is self.linear.weight:  # no scale is moved into it
            return fake_quantize(weight, *scale_of(self.linear), self.linear.args)
        return round_in_range(weight, self._parts(), self.linear.args, dtype)

    @torch.no_grad()
    def apply(self) -> None:
        if self._fixed:
            return
        linear, parts = self.linear, self._parts()
        low, high = ranges_with_gradients(linear.weight, linear.args)
        scale, zero = range_scale_with_gradients(low * parts[0], high * parts[-1], linear.args)
        linear.scale, linear.zero = scale, None if zero is None else zero.to(torch.uint8)

    def _parts(self) -> tuple[Tensor, ...]:
        if self._fixed:
            return ()
        return tuple(self._widest * torch.sigmoid(logit) for logit in self._logits)


class _Learning:
    """Everything that is learned for a block."""

    def __init__(
        self,
        block: Block,
        reconstruction: Reconstruction,
        moves: list[_Move],
        clips: list[_Clip],
        dtype: torch.dtype,
    ) -> None:
        self._block, self._reconstruction = block, reconstruction
        self._moves, self._clips = moves, clips
        self._dtype = dtype

    def values(self) -> dict[str, Tensor]:
        """The parameters of the block, with scale and offsets moved, and weights rounded."""
        values = self._reconstruction.parameters
        for move in self._moves:
            if move.offset is not None:
                values = self._reconstruction.shifted(values, move.group, move.offset)
            values = self._reconstruction.smoothed(values, move.group, move.scale(self._block))
        for clip in self._clips:
            name = f"{clip.linear.name}.weight"
            values[name] = clip.weight(values[name], self._dtype)
        return values

    @torch.no_grad()
    def apply(self) -> None:
        """Change the block as was learned."""
        for move in self._moves:
            if move.offset is not None:
                self._block.shift(move.group, move.offset)
            self._block.smooth(move.group, move.scale(self._block))
        for clip in self._clips:
            clip.apply()
