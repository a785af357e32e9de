"""The contract of algorithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from qplug.api.block import Block, QuantizedWeight
from qplug.api.component import Component, P
from qplug.api.float_model import FloatModel, Preparation, WholeModel
from qplug.api.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


#: What an algorithm spends its time on: it rounds to nearest, searches scales on Gram matrices as
#: AWQ does, or solves with their factors column by column as GPTQ does.
Effort: TypeAlias = Literal["rounds", "searches", "solves"]


class Algorithm(Component[P]):
    """A way to quantize. It implements one or more of ``prepare``, ``transform`` and ``quantize``.

    ``needs_data``: whether it reads ``block.groups``. ``learns_blocks``: whether it reads
    ``block.reconstruction``, for which the run keeps the inputs and target outputs of each block.
    An algorithm with ``learns_blocks`` or with ``learn_rewrite`` also sets ``needs_data``.
    ``effort``: what it spends its time on, ``"rounds"``, ``"searches"`` (as AWQ) or ``"solves"``
    (as GPTQ), from which ``--dry-run`` estimates the time; None if it is none of these.

    An algorithm changes a block by ``block.smooth``, ``block.shift`` and ``block.replace``, and by
    setting ``linear.scale`` and ``linear.zero``. It never changes a tensor in place.
    """

    needs_data: ClassVar[bool] = False
    learns_blocks: ClassVar[bool] = False
    effort: ClassVar[Effort | None] = None

    @property
    def needs_drift(self) -> bool:
        """Whether it reads ``InputGroup.drift``, for which the float model runs too."""
        return False

    @property
    def by_group(self) -> bool:
        """Whether ``quantize`` treats each input group by itself.

        Then it may be given the groups of a block in several parts, where memory is scarce.
        """
        return False

    @property
    def decides(self) -> frozenset[str]:
        """Choices that a later algorithm must not undo, as phrases: "the scales of inputs".

        A pipeline with two algorithms that decide the same is refused. An algorithm that improves
        the choices of earlier ones decides nothing.
        """
        return frozenset()

    def refuses(self, schemes: Sequence[Scheme]) -> str | None:
        """Why the algorithm is of no use for a recipe with ``schemes``, as a sentence, or None.

        Called before any work. ``schemes``: the scheme of the model, then those of overrides.
        """
        return None

    def prepare(self, model: FloatModel) -> Preparation:
        """Rewrite the float model, tensor by tensor, without a change of its outputs.

        Also called for a small random copy of the model, on which the rewrite is tried. With
        ``model.learned`` it rewrites the same tensors as without.
        """
        raise NotImplementedError

    def learn_rewrite(self, model: FloatModel, whole: WholeModel) -> Mapping[str, Tensor]:
        """Learn parameters for ``prepare`` on calibration data.

        Returns tensors under names of your choice; they come back as ``FloatModel.learned``. Called
        once in a run, by its first process, when all else has been checked. The result is kept with
        the unfinished output, so a resumed run does not learn again.
        """
        raise NotImplementedError

    def transform(self, block: Block) -> None:
        """Move scale within a block, or choose clips, before codes are computed."""

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        """Codes for every linear of ``block``, by name."""
        raise NotImplementedError

    @classmethod
    def quantizes(cls) -> bool:
        """Whether the algorithm implements ``quantize``."""
        return cls.quantize is not Algorithm.quantize

    @classmethod
    def transforms(cls) -> bool:
        """Whether the algorithm implements ``transform``."""
        return cls.transform is not Algorithm.transform

    @classmethod
    def prepares(cls) -> bool:
        """Whether the algorithm implements ``prepare``."""
        return cls.prepare is not Algorithm.prepare

    @classmethod
    def learns_rewrite(cls) -> bool:
        """Whether the algorithm implements ``learn_rewrite``."""
        return cls.learn_rewrite is not Algorithm.learn_rewrite
