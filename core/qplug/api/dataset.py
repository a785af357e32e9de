"""What a dataset is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from qplug.api.component import Component, P

if TYPE_CHECKING:
    from torch import Tensor

#: What text is for. A dataset may have one text for both.
Split = Literal["calibration", "evaluation"]


class Tokenizer(Protocol):
    """What datasets need of a tokenizer; those of transformers have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of the tokens of ``text``; special tokens mark its start and end if asked for."""
        ...


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

        A window may be shorter than ``length``; it is padded then, and the padding is ignored. The
        same seed gives the same samples. A dataset that does not define this method is cut by
        ``qplug.text.random_windows``: it joins all documents, tokenises them once without special
        tokens, and draws windows at random.
        """
        raise NotImplementedError

    @classmethod
    def cuts_windows(cls) -> bool:
        """Whether this dataset cuts calibration windows itself."""
        return cls.samples is not Dataset.samples
