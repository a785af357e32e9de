"""The chat template of a tokenizer: the text of a conversation, and the answers in this text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

from qplug.errors import QplugError, reason

if TYPE_CHECKING:
    from qplug.api import Conversation

#: A message as chat templates take it.
Message: TypeAlias = dict[str, Any]

#: With this tag a template says itself which text the model generates.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: An answer that no template changes and that no conversation has.
_STAND_IN = "qplug-answer-7b1e0c"


@dataclass(frozen=True)
class Template:
    """The chat template of ``tokenizer`` with the tools and the variables of ``conversation``.

    ``chat_template`` takes its place, if given. Raises QplugError if there is no template, or if it
    does not have one of the variables.
    """

    tokenizer: Any
    conversation: Conversation
    chat_template: str | None = None

    def __post_init__(self) -> None:
        where = self.conversation.where
        if not (self.chat_template or getattr(self.tokenizer, "chat_template", None)):
            raise QplugError(
                f"{where}: the model's tokenizer has no chat template to render a conversation: "
                'take a model for chats, or give text ({"text": ...})'
            )
        reserved = inspect.signature(self.tokenizer.apply_chat_template).parameters
        for name in self.conversation.template_options:
            if name in reserved or not re.search(rf"\b{re.escape(name)}\b", self._source):
                raise QplugError(f"{where}: the model's chat template has no variable {name!r}")

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Returns ``messages`` as the template writes them.

        ``prompt`` adds the words with which an answer begins. Raises QplugError if the template
        refuses the messages.
        """
        text: str = self._apply(messages, tokenize=False, add_generation_prompt=prompt)
        return text

    def answered_tokens(
        self, messages: Sequence[Message], text: str
    ) -> tuple[list[int], list[bool]]:
        """Returns the tokens of ``text``, which is ``messages``, and which of them are answers.

        The token that ends an answer is a part of it. Raises QplugError if the template neither
        says what the answers are (``{% generation %}``) nor writes them where they can be found.
        """
        if _GENERATION.search(self._source):
            found = self._apply(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(found["input_ids"]), list(map(bool, found["assistant_masks"]))
        spans = self._answers(messages, text)
        try:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError as error:
            raise self._cannot("a tokenizer of the tokenizers library") from error
        inside = [0] * (len(text) + 1)
        for start, end in spans:
            inside[start] += 1
            inside[end] -= 1
        open_at = list(accumulate(inside))
        return list(found["input_ids"]), [
            start < end and open_at[start] > 0 for start, end in found["offset_mapping"]
        ]

    def _answers(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Returns where the answers begin and end in ``text``."""
        return [
            (self._start(messages, number, text), self._end(messages, number, text))
            for number, message in enumerate(messages)
            if message.get("role") == "assistant"
        ]

    def _start(self, messages: Sequence[Message], number: int, text: str) -> int:
        """Returns where message ``number`` begins: behind what the messages before it become."""
        before = messages[:number]
        for prompt in (True, False):
            beginning = self.attempt(before, prompt=prompt) if before else ""
            if beginning is not None and text.startswith(beginning):
                return len(beginning)
        raise self._cannot("a chat template that writes messages in order")

    def _end(self, messages: Sequence[Message], number: int, text: str) -> int:
        """Returns where message ``number`` ends, behind the token that ends it.

        Many templates write an answer differently if it is the last message, for example with its
        thoughts. The end is then found from behind: where the same text follows a short answer.
        """
        through = self.attempt(messages[: number + 1])
        if through is not None and text.startswith(through):
            return len(through.rstrip())
        answer = {"role": "assistant", "content": _STAND_IN}
        other = self.attempt([*messages[:number], answer, *messages[number + 1 :]])
        if other is not None and other.count(_STAND_IN) == 1:
            rest = other.partition(_STAND_IN)[2]
            if text.endswith(rest):
                end = len(text) - len(rest)
                special = [s for s in self.tokenizer.get_added_vocab() if text.startswith(s, end)]
                return end + max(map(len, special), default=0)
        raise self._cannot("a chat template with {% generation %}")

    def attempt(self, messages: Sequence[Message], *, prompt: bool = False) -> str | None:
        """Returns ``text``, or None if the template refuses the messages."""
        try:
            return self.text(messages, prompt=prompt)
        except QplugError:
            return None

    def _cannot(self, needed: str) -> QplugError:
        return QplugError(
            f"{self.conversation.where}: --mask prompts needs {needed}, to tell its answers from "
            "its prompts; leave --mask out"
        )

    @property
    def _source(self) -> str:
        """The text of the template."""
        source: str = self.tokenizer.get_chat_template(self.chat_template, self._tools)
        return source

    @property
    def _tools(self) -> list[dict[str, Any]] | None:
        return list(map(dict, self.conversation.tools)) or None

    def _apply(self, messages: Sequence[Message], **how: Any) -> Any:
        options = self.conversation.template_options
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), self._tools, chat_template=self.chat_template, **options, **how
            )
        except Exception as error:  # a template raises anything for messages it does not expect
            where = self.conversation.where
            raise QplugError(f"{where}: the chat template refuses it: {reason(error)}") from error
