"""OmniQuant (Shao et al., arXiv 2308.13137): clips and scales learned block by block.

Learnable weight clipping (section 3.2) has a part of each range to learn, and learnable equivalent
transformation (section 3.3) scales and offsets of the inputs of linears. Both begin at what a
search finds, or what algorithms before have found.
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
    scale_of,
    scaling_error,
    start_clips,
    unclipped_ratio,
)

#: How much wider than one that clips nothing a range can become.
_WIDEST = 1.25


@dataclass(frozen=True)
class Params:
    lwc: Annotated[bool, Param("Learn clips of weights.")] = True
    let: Annotated[bool, Param("Learn scales of inputs.")] = True
    shift: Annotated[
        bool, Param("Learn offsets of inputs, where biases can take them.", also=("use_shift",))
    ] = True
    lwc_lr: Annotated[float, Param("The first step of clips.", 0)] = 1e-2
    let_lr: Annotated[float, Param("The first step of scales and offsets.", 0)] = 5e-3
    weight_decay: Annotated[float, Param("Of AdamW.", 0, also=("wd",))] = 0.0
    epochs: Annotated[int, Param("Passes over the calibration data, at most.", 1)] = 5
    patience: Annotated[
        int | None, Param("Passes without a better result, until it ends; none: never.", 1)
    ] = None
    aug_loss: Annotated[
        bool, Param("Match the float block on the same inputs too, not the float model alone.")
    ] = False
    dtype: Annotated[
        Literal["float32", "bfloat16"], Param("Of the matrix products while learning.")
    ] = "float32"
    alpha: Annotated[float, Param("The largest exponent of scales to begin at.", 0, 1)] = 0.5
    clip_steps: Annotated[int, Param("Steps of the clip search to begin at.", 1)] = 20
    clip_smallest: Annotated[
        float, Param("The smallest range to begin at, of the full one.", 0.05, 1)
    ] = 0.6

    def __post_init__(self) -> None:
        if not (self.lwc or self.let):
            raise QplugError("omniquant has nothing to learn: neither lwc nor let")


class OmniQuant(Algorithm[Params]):
    """Learn clips of weights and scales of inputs, so that whole blocks compute what they did."""

    name = "omniquant"
    Params = Params
    needs_data = True
    learns = True

    def transform(self, block: Block) -> None:
        params = self.params
        if block.reconstruction is None:
            raise QplugError("omniquant learns from calibration data, and here is none")
        scalable = [group for group in block.groups if group.scalable] if params.let else []
        for group in scalable:
            self._start(block, group)
        start_clips(block.groups, steps=params.clip_steps, smallest=params.clip_smallest)
        moves = [_Move(group, shift=params.shift and group.shiftable) for group in scalable]
        clips = [_Clip(linear, learned=params.lwc) for linear in block.linears]
        of_moves = [tensor for move in moves for tensor in move.learned()]
        of_clips = [tensor for clip in clips for tensor in clip.learned()]
        if not (of_moves or of_clips):
            block.notes.append(f"{block.name}: has nothing that omniquant could learn")
            return
        learning = _Learning(block, block.reconstruction, moves, clips)
        optimizer = torch.optim.AdamW(
            [
                {"params": tensors, "lr": lr}
                for tensors, lr in ((of_clips, params.lwc_lr), (of_moves, params.let_lr))
                if tensors
            ],
            weight_decay=params.weight_decay,
        )
        found = learn(
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
            f"{block.name}: error of its output {found.before:.4g}, {found.after:.4g} once learned"
        )

    def _start(self, block: Block, group: InputGroup) -> None:
        """Give ``group`` the scale of least error of a few; none at all may be best."""

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
    """The part of a weight's range that is kept, at its low and its high end: ``scale_shape``.

    One for both ends, if weights are symmetric. Each is a logit: ``widest * sigmoid``. Where scales
    cannot be learned, a weight that scale is moved into has its full range.
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
        self._still = ranges_with_gradients(linear.weight, args)

    def learned(self) -> list[Tensor]:
        return [x for x in self._logits if x.requires_grad and not self._fixed]

    def weight(self, weight: Tensor) -> Tensor:
        """``weight`` as it would be stored, with gradients."""
        # A weight that nothing is moved into keeps its extremes.
        args, moved = self.linear.args, weight is not self.linear.weight
        if self._fixed and not moved:
            return fake_quantize(weight, *scale_of(self.linear), args)
        return fake_quantize(
            weight,
            *self._scale(*(ranges_with_gradients(weight, args) if moved else self._still)),
            args,
        )

    @torch.no_grad()
    def apply(self) -> None:
        if self._fixed:
            return
        linear = self.linear
        scale, zero = self._scale(*ranges_with_gradients(linear.weight, linear.args))
        linear.scale, linear.zero = scale, None if zero is None else zero.to(torch.uint8)

    def _scale(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        args = self.linear.args
        if self._fixed:
            return range_scale_with_gradients(low, high, args)
        parts = [self._widest * torch.sigmoid(logit) for logit in self._logits]
        return range_scale_with_gradients(low * parts[0], high * parts[-1], args)


class _Learning:
    """All that is learned of a block."""

    def __init__(
        self, block: Block, reconstruction: Reconstruction, moves: list[_Move], clips: list[_Clip]
    ) -> None:
        self._block, self._reconstruction = block, reconstruction
        self._moves, self._clips = moves, clips

    def values(self) -> dict[str, Tensor]:
        """The parameters of the block, moved and rounded."""
        made = self._reconstruction.parameters
        for move in self._moves:
            if move.offset is not None:
                made = self._reconstruction.shifted(made, move.group, move.offset)
            made = self._reconstruction.smoothed(made, move.group, move.scale(self._block))
        for clip in self._clips:
            name = f"{clip.linear.name}.weight"
            made[name] = clip.weight(made[name])
        return made

    @torch.no_grad()
    def apply(self) -> None:
        """Let the block have what was learned."""
        for move in self._moves:
            if move.offset is not None:
                self._block.shift(move.group, move.offset)
            self._block.smooth(move.group, move.scale(self._block))
        for clip in self._clips:
            clip.apply()
