"""Scales that several linears of a block have in common."""

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
    """Choose ``input_scale`` of the linears of ``block`` that have static inputs and none yet.

    The experts of a layer get one scale, which engines have room for, and which holds for experts
    that saw no token. Raises QplugError, without the block's name, where none has shown a range.
    """
    for _, alike in groupby(block.groups, lambda group: group.experts or id(group)):
        groups = [*alike]
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
    """Give the linears of a group whose weights have one scale each the same: the largest.

    Of experts, those of one. Engines fuse such linears, keep the largest scale, and round the codes
    of the others once more: with one scale from the start there is nothing left to round.
    """
    for group in (part for whole in block.groups for part in whole.parts):
        for args in dict.fromkeys(linear.args for linear in group.linears):
            if args.strategy != "tensor" or not args.symmetric:
                continue
            alike = [linear for linear in group.linears if linear.args == args]
            shared = torch.stack([scale_of(linear)[0] for linear in alike]).amax(0)
            for linear in alike:
                linear.scale, linear.zero = shared, None


def share_global_scales(block: Block, merged: Sequence[Sequence[str]]) -> None:
    """Fix the global scales of the linears of ``block`` whose scales have two levels.

    Those of a group in ``merged`` get the largest: engines keep that one, and round nothing anew.
    Scales that were chosen already are rounded to multiples of it.
    """
    linears = {linear.name: linear for linear in block.linears if linear.args.two_level}
    for linear in linears.values():
        linear.global_scale = global_scale_of(linear)
    for names in merged:
        alike = [linears[name] for name in names if name in linears]
        units = [linear.global_scale for linear in alike if linear.global_scale is not None]
        for linear in alike:
            linear.global_scale = torch.stack(units).amax(0)
    for linear in linears.values():
        if linear.scale is not None:
            linear.scale = as_stored(linear.scale, linear.args, linear.global_scale)
