"""What an algorithm is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from qplug.api.block import Block, QuantizedWeight
from qplug.api.component import Component, P
from qplug.api.float_model import FloatModel, Preparation, WholeModel
from qplug.api.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


class Algorithm(Component[P]):
    """A way to quantize. Three stages; an algorithm fills in those it needs.

    ``needs_data`` says whether it reads ``block.groups``. An algorithm changes a block by
    ``block.smooth``, ``block.shift`` and ``block.replace``, and by choosing ``linear.scale`` and
    ``linear.zero``; it leaves tensors as they are. ``learns`` says whether it reads
    ``block.reconstruction``, for which what enters and what shall leave the block is kept; it
    ``needs_data`` then too, and so does one that defines ``learn``.
    """

    needs_data: ClassVar[bool] = False
    learns: ClassVar[bool] = False

    @property
    def needs_drift(self) -> bool:
        """Whether it reads ``InputGroup.drift``, for which the float model runs beside."""
        return False

    @property
    def settles(self) -> frozenset[str]:
        """What it chooses once for all, in words: ``the scales of inputs``.

        Two algorithms of a pipeline that settle the same are refused: the later would undo what the
        earlier chose. One that starts from what others chose, and goes on from there, settles none.
        """
        return frozenset()

    def refuses(self, schemes: Sequence[Scheme]) -> str | None:
        """A sentence that says why it makes no sense for a recipe with ``schemes``, or None.

        Asked before any work. ``schemes``: that of the model, then those of overrides.
        """
        return None

    def prepare(self, model: FloatModel) -> Preparation:
        """Rewrite the float model, tensor by tensor, without a change of what it computes.

        Also called for a small random copy of the model, on which what it gives is tried. With
        ``model.learned`` it rewrites the same tensors as without.
        """
        raise NotImplementedError

    def learn(self, model: FloatModel, whole: WholeModel) -> Mapping[str, Tensor]:
        """What ``prepare`` shall go by, learned on the calibration data: tensors, by any name.

        Called once in a run, by its first process, when all else has been checked; what it gives
        is kept with the unfinished output, and comes back as ``FloatModel.learned``.
        """
        raise NotImplementedError

    def transform(self, block: Block) -> None:
        """Move scale within a block, and choose clips, before codes are computed."""

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        """Codes for every linear of ``block``, by name."""
        raise NotImplementedError

    @classmethod
    def quantizes(cls) -> bool:
        """Whether this algorithm computes codes itself."""
        return cls.quantize is not Algorithm.quantize

    @classmethod
    def prepares(cls) -> bool:
        """Whether this algorithm rewrites the float model."""
        return cls.prepare is not Algorithm.prepare

    @classmethod
    def learns_whole(cls) -> bool:
        """Whether this algorithm learns on the whole float model how to rewrite it."""
        return cls.learn is not Algorithm.learn
