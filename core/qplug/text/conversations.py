"""Renders conversations with the chat template of a model, and turns them into tokens.

The rendered text has the special tokens that the template writes, and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qplug.files.json_text import parse_json
from qplug.text.chat_template import Message, Template

if TYPE_CHECKING:
    from torch import Tensor

    from qplug.api import Conversation


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens for calibration, int64 ``[length]``, without padding.

    ``counted``, bool ``[length]``, is false for tokens that statistics leave out; None if all
    count. ``extra`` are further inputs of the model, such as pixels, by the name of the argument.
    """

    tokens: Tensor
    counted: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def part(self, start: int, length: int) -> Sample:
        """Returns up to ``length`` tokens from ``start`` on."""
        counted = None if self.counted is None else self.counted[start : start + length]
        return Sample(self.tokens[start : start + length], counted, self.extra)

    @property
    def counts(self) -> bool:
        """Whether statistics count a token of this sample."""
        return self.counted is None or bool(self.counted.any())


@dataclass(frozen=True)
class Renderer:
    """Renders conversations for the model of ``tokenizer``, a tokenizer of transformers.

    ``answers_only``: statistics count the tokens of the assistant's messages, and no others.
    """

    tokenizer: Any
    answers_only: bool = False

    def __call__(self, conversation: Conversation) -> Sample:
        """Returns the tokens of ``conversation``.

        Raises QplugError if the tokenizer has no chat template, if its template refuses the
        conversation, or if ``answers_only`` and the answers cannot be found in what it writes.
        """
        template = Template(self.tokenizer, conversation)
        messages = messages_of(conversation)
        text = template.text(messages)
        if not self.answers_only:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            return Sample(torch.tensor(ids, dtype=torch.int64))
        ids, answered = template.answered_tokens(messages, text)
        return Sample(torch.tensor(ids), torch.tensor(answered, dtype=torch.bool))


def messages_of(conversation: Conversation) -> list[Message]:
    """Returns the messages in the form that chat templates expect, as engines do.

    Content that is a list of texts becomes one text, with a line for each; the arguments of tool
    calls, which the OpenAI API writes as JSON in a string, become a mapping.
    """
    return [_message(message, conversation.where) for message in conversation.messages]


def _message(message: Mapping[str, Any], where: str) -> Message:
    changed = dict(message)
    content = message.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        changed["content"] = "\n".join(part.get("text", "") for part in content)
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_tool_call(call, where) for call in calls]
    return changed


def _tool_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    text = function["arguments"]
    arguments = parse_json(text, f"{where}: arguments of a tool call: not JSON") if text else {}
    return {**call, "function": {**function, "arguments": arguments}}
