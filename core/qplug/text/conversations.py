"""Renders conversations with the chat template of a model, and turns them into tokens.

The rendered text has the special tokens that the template writes, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qplug.errors import QplugError, reason
from qplug.files.json_text import parse_json
from qplug.text.chat_template import Message, Template
from qplug.text.pictures import has_pictures, is_picture, pictures_of

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
    ``processor`` returns the processor of the model, for conversations with pictures.
    """

    tokenizer: Any
    answers_only: bool = False
    processor: Callable[[], Any] | None = None

    def __call__(self, conversation: Conversation) -> Sample:
        """Returns the tokens of ``conversation``, and the inputs that its pictures become.

        Raises QplugError if there is no chat template, if the template refuses the conversation, if
        a picture cannot be read, or if ``answers_only`` and the answers cannot be found in what the
        template writes.
        """
        if has_pictures(conversation):
            return self._with_pictures(conversation)
        template = Template(self.tokenizer, conversation)
        messages = _fitting(template, conversation)
        text = template.text(messages)
        if not self.answers_only:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            return Sample(torch.tensor(ids, dtype=torch.int64))
        ids, answered = template.answered_tokens(messages, text)
        return Sample(torch.tensor(ids), torch.tensor(answered, dtype=torch.bool))

    def _with_pictures(self, conversation: Conversation) -> Sample:
        if self.processor is None:
            raise QplugError(f"{conversation.where}: has pictures, and only text is read here")
        pictures, processor = pictures_of(conversation), self.processor()
        template = Template(self.tokenizer, conversation, template_of(processor))
        messages = messages_of(conversation, in_parts=True)
        text = template.text(messages)
        try:
            inputs = processor(
                text=[text], images=[pictures], return_tensors="pt", add_special_tokens=False
            )
        except Exception as error:  # a processor raises anything for what it does not expect
            raise QplugError(
                f"{conversation.where}: the model's processor refuses it: {reason(error)}"
            ) from error
        tokens: Tensor = inputs["input_ids"][0]
        extra = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and name not in ("input_ids", "attention_mask")
        }
        if not self.answers_only:
            return Sample(tokens, extra=extra)
        counted = _spread(*template.answered_tokens(messages, text), tokens.tolist())
        if counted is None:
            raise QplugError(
                f"{conversation.where}: --mask prompts does not find its answers between its "
                "pictures; leave --mask out"
            )
        return Sample(tokens, torch.tensor(counted, dtype=torch.bool), extra)


def template_of(processor: Any) -> str | None:
    """Returns the chat template of a processor, None if the tokenizer has the template."""
    template = getattr(processor, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _spread(ids: list[int], answered: list[bool], tokens: list[int]) -> list[bool] | None:
    """Returns which ``tokens`` are answers.

    ``tokens`` are ``ids`` with further tokens where a processor put in pictures, and these count as
    no answer. None if they are something else.
    """
    spread, place = [False] * len(tokens), 0
    for number, token in enumerate(tokens):
        if place < len(ids) and token == ids[place]:
            spread[number] = answered[place]
            place += 1
    return spread if place == len(ids) else None


def _fitting(template: Template, conversation: Conversation) -> list[Message]:
    """Returns the messages in the form in which the template writes all words of users.

    Templates of models for pictures may expect a list of parts, and write nothing of a text.
    """
    texts = messages_of(conversation)
    users = [m["content"] for m in texts if m["role"] == "user" and m.get("content")]
    for messages in (texts, messages_of(conversation, in_parts=True)):
        written = template.attempt(messages)
        if written is not None and all(words.strip() in written for words in users):
            return messages
    return texts


def messages_of(conversation: Conversation, *, in_parts: bool = False) -> list[Message]:
    """Returns the messages in the form that chat templates expect, as engines do.

    Content that is a list of texts becomes one text, with a line for each; or, ``in_parts``, every
    content becomes a list. The arguments of tool calls, which the OpenAI API writes as JSON in a
    string, become a mapping.
    """
    return [_message(message, in_parts, conversation.where) for message in conversation.messages]


def _message(message: Mapping[str, Any], in_parts: bool, where: str) -> Message:
    changed = dict(message)
    content = message.get("content")
    if in_parts and isinstance(content, str):
        changed["content"] = [{"type": "text", "text": content}]
    elif in_parts and content is not None:
        changed["content"] = [{"type": "image"} if is_picture(p) else dict(p) for p in content]
    elif isinstance(content, list):
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
