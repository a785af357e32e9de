"""The parts of a model that text does not pass: towers for pictures and sound, their projectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from qplug.model.small_copy import SmallCopy


def beside_text(copy: SmallCopy) -> tuple[str, ...]:
    """The names of the modules and parameters outside of decoder blocks that text does not pass.

    No name says so: with other weights in such a part, ``copy`` computes the same logits of text to
    the last bit. So a check of these logits says nothing about the part. Of each part the topmost
    module is named. A head that ranks is passed by text.
    """
    return tuple(_Trial(copy).silent("", copy.model))


class _Trial:
    def __init__(self, copy: SmallCopy) -> None:
        self._copy = copy
        self._blocks = tuple(f"{name}." for name in copy.blocks)
        self._plain = copy.run().logits

    def silent(self, path: str, module: nn.Module) -> Iterator[str]:
        """Yields the topmost silent parts of ``module``, whose name is ``path`` with a dot."""
        for local, parameter in module.named_parameters(recurse=False):
            if self._is_silent([parameter]):
                yield f"{path}{local}"
        for local, child in module.named_children():
            name = f"{path}{local}"
            inside = [
                parameter
                for inner, parameter in child.named_parameters(prefix=name)
                if not inner.startswith(self._blocks)
            ]
            if not inside:
                continue
            if self._is_silent(inside):
                yield name
            else:
                yield from self.silent(f"{name}.", child)

    def _is_silent(self, parameters: Iterable[nn.Parameter]) -> bool:
        parameters = list(parameters)
        _change(parameters)
        try:
            return torch.equal(self._copy.run().logits, self._plain)
        finally:
            _change(parameters)


def _change(parameters: Iterable[nn.Parameter]) -> None:
    """Give ``parameters`` other values; done twice, it restores them to the last bit."""
    for parameter in parameters:
        parameter.data = -parameter.data.flip(-1)
