"""The base class of datasets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from qplug.api.component import Component, P

if TYPE_CHECKING:
    from torch import Tensor

#: The purpose of text. A dataset may use the same text for both.
Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Conversation:
    """A conversation with a model, which qplug renders with the model's own chat template.

    ``messages`` and ``tools`` are written as in requests to the OpenAI API. ``template_options``
    are further variables of the template, such as ``enable_thinking``. ``pictures`` is the folder
    of the pictures that messages name, None if there are none. ``where`` is the place of the
    conversation, such as ``chats.jsonl:3``, for messages of errors.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    pictures: Path | None = None
    where: str = "a conversation"


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
    def documents(self, split: Split) -> Iterator[str] | Iterator[Conversation]:
        """Yields the documents, always in the same order. A document may be empty.

        Documents are either all texts or all conversations. Raises QplugError, before the first
        document, if they cannot be read.
        """

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int
    ) -> Iterator[Tensor] | Iterator[Conversation]:
        """Yields ``count`` windows of tokens for calibration, int64 ``[length]``.

        A window may be shorter than ``length``; it is padded, and padding is ignored. The same
        seed must give the same samples. Conversations may be yielded instead, more than ``count``
        of them: qplug takes the first ``count`` that have tokens to calibrate on. For a dataset
        that does not define this method, qplug draws the samples: ``qplug.text.random_windows``
        from the joined text, or one sample from each conversation.
        """
        raise NotImplementedError

    @classmethod
    def cuts_windows(cls) -> bool:
        """Whether this dataset cuts calibration windows itself."""
        return cls.samples is not Dataset.samples
