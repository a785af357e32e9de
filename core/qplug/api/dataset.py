"""The base class of datasets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from qplug.api.component import Component, P

if TYPE_CHECKING:
    from torch import Tensor

#: The purpose of text. A dataset may use the same text for both.
Split = Literal["calibration", "evaluation"]


class Tokenizer(Protocol):
    """The method of a tokenizer that datasets call; tokenizers of transformers have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of ``text``, with special tokens around it if asked for."""
        ...


class Dataset(Component[P]):
    """A source of text for calibration and for evaluation."""

    #: The text between two documents when they are joined.
    separator: ClassVar[str] = "\n\n"

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """Yields the documents, always in the same order. A document may be empty.

        Raises QplugError, before the first document, if the text cannot be read.
        """

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int
    ) -> Iterator[Tensor]:
        """Yields ``count`` windows of tokens for calibration, int64 ``[length]``.

        A window may be shorter than ``length``; it is padded, and padding is ignored. The same
        seed must give the same samples. For a dataset that does not define this method,
        ``qplug.text.random_windows`` draws the samples: it joins all documents, tokenises them once
        without special tokens, and draws windows at random.
        """
        raise NotImplementedError

    @classmethod
    def cuts_windows(cls) -> bool:
        """Whether this dataset cuts calibration windows itself."""
        return cls.samples is not Dataset.samples
