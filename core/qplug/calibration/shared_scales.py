"""Scales that several linears of a block share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from qplug.api import Block, InputGroup
from qplug.api.scheme import QuantArgs
from qplug.calibration.observers import Observer
from qplug.errors import QplugError
from qplug.numerics.activations import input_scale
from qplug.numerics.scale_formats import as_stored
from qplug.numerics.scales import global_scale_of, scale_of


def fix_input_scales(block: Block, observer: Observer[Any]) -> None:
    """Set ``input_scale`` of the linears of ``block`` that need a static scale and have none.

    All experts of a layer get one scale: engines store one, and it also serves experts that saw no
    token. Raises QplugError, without the name of the block, if no token reached a linear.
    """
    for _, sharing in groupby(block.groups, lambda group: group.experts or id(group)):
        groups = [*sharing]
        linears = [linear for group in groups for linear in group.linears]
        for args in dict.fromkeys(linear.activations for linear in linears):
            if args is None or not args.stores_scale:
                continue
            peaks = [observer.peak(g, args) for g in groups if g.tokens and _reads_with(g, args)]
            if not peaks or not torch.isfinite(torch.stack(peaks)).all():
                names = ", ".join(linear.name for linear in linears)
                raise QplugError(f"{names}: no range of inputs was seen in the calibration data")
            scale = input_scale(torch.stack(peaks).amax(), args).reshape(1)
            for linear in linears:
                if linear.activations == args and linear.input_scale is None:
                    linear.input_scale = scale
    for linear in block.linears:
        if linear.activations and linear.activations.stores_scale and linear.input_scale is None:
            raise QplugError(f"{linear.name}: no token of the calibration data reached it")


def _reads_with(group: InputGroup, args: QuantArgs) -> bool:
    return any(linear.activations == args for linear in group.linears)


def share_tensor_scales(block: Block) -> None:
    """Give linears of a group with one scale per weight the same scale: the largest of them.

    For experts: within one expert, not across. Engines fuse such linears, keep the largest scale,
    and round the codes of the others again; with one scale from the start nothing is rounded twice.
    """
    for group in (same for whole in block.groups for same in whole.by_tokens):
        for args in dict.fromkeys(linear.args for linear in group.linears):
            if args.strategy != "tensor" or not args.symmetric:
                continue
            sharing = [linear for linear in group.linears if linear.args == args]
            shared = torch.stack([scale_of(linear)[0] for linear in sharing]).amax(0)
            for linear in sharing:
                linear.scale, linear.zero = shared, None


def share_global_scales(block: Block, merged: Sequence[Sequence[str]]) -> None:
    """Set the global scales of the linears of ``block`` whose scales have two levels.

    All linears of a group in ``merged`` get the largest global scale of the group, which engines
    would keep. Scales that algorithms have chosen are rounded to multiples of it.
    """
    linears = {linear.name: linear for linear in block.linears if linear.args.two_level}
    for linear in linears.values():
        linear.global_scale = global_scale_of(linear)
    for names in merged:
        merging = [linears[name] for name in names if name in linears]
        scales = [linear.global_scale for linear in merging if linear.global_scale is not None]
        for linear in merging:
            linear.global_scale = torch.stack(scales).amax(0)
    for linear in linears.values():
        if linear.scale is not None:
            linear.scale = as_stored(linear.scale, linear.args, linear.global_scale)
