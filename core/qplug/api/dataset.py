"""What a dataset is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from qplug.api.component import Component, P

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["calibration", "evaluation"]


class Tokenizer(Protocol):
    """What datasets need of a tokenizer; those of transformers have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class Dataset(Component[P]):
    """Text, for calibration and for evaluation."""

    #: What stands between two documents when they are read as one text.
    separator: ClassVar[str] = "\n\n"

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """The documents, in an order that is always the same. Some may be empty.

        Raises QplugError, before the first document, if the text cannot be had.
        """

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int
    ) -> Iterator[Tensor]:
        """``count`` windows of ``length`` tokens for calibration, int64 ``[length]``.

        A window may be shorter, as a text may; what it is then filled up with enters no statistics.
        The same seed gives the same samples. The default joins all documents, tokenises once
        without special tokens, and draws windows at random.
        """
        from qplug.text.windows import random_windows

        return random_windows(self, tokenizer, length=length, count=count, seed=seed)
