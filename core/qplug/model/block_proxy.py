"""A module that takes the place of a decoder block in its model."""

from __future__ import annotations

from typing import Any

from torch import nn


class BlockProxy(nn.Module):
    """Has the attributes of ``block``, without its parameters, and is called in its place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not registered, so its parameters are not the proxy's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)
