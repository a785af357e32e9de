"""A module that stands for a decoder block in its model."""

from __future__ import annotations

from typing import Any

from torch import nn

from qplug.errors import QplugError


class StandIn(nn.Module):
    """Has what is asked of ``block`` but its parameters, and is called in its place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not registered: its parameters are no part of this

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


def refuse_positional(args: tuple[Any, ...]) -> None:
    """Raises QplugError if a block is given more than hidden states without saying what it is."""
    if args:
        raise QplugError("this architecture's blocks take arguments that qplug cannot follow")
