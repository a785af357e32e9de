"""Conversations become tokens by the model's own chat template, and answers are found in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chats import BACKWARDS, CHATML, GENERATION, chat_tokenizer, turns

from qplug import Conversation, QplugError
from qplug.text.conversations import Renderer, Sample

WEATHER = [
    {"role": "user", "content": "Is it wet in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Look.",
        "tool_calls": [{"function": {"name": "look", "arguments": '{"city": "Rome"}'}}],
    },
    {"role": "tool", "content": "dry"},
    {"role": "assistant", "content": "It is dry."},
]
LOOK = {"type": "function", "function": {"name": "look", "parameters": {}}}


def rendered(*messages: dict[str, Any], template: str | None = CHATML, **options: Any) -> Sample:
    conversation = Conversation(messages, template_options=options)
    return Renderer(chat_tokenizer(template), answers_only=True)(conversation)


def text_of(sample: Sample, only: torch.Tensor | None = None) -> str:
    tokens = sample.tokens if only is None else sample.tokens[only]
    return str(chat_tokenizer().decode(tokens))


def answers_of(sample: Sample) -> str:
    assert sample.counted is not None
    return text_of(sample, sample.counted)


def test_the_template_writes_the_tokens() -> None:
    tokenizer = chat_tokenizer()
    conversation = Conversation(WEATHER, (LOOK,))
    sample = Renderer(tokenizer)(conversation)
    assert sample.counted is None
    assert sample.tokens.dtype == torch.int64
    assert text_of(sample) == (
        "<|im_start|>system\nlook<|im_end|>\n"
        "<|im_start|>user\nIs it wet in Rome?<|im_end|>\n"
        "<|im_start|>assistant\n<think>Look.</think>\n<call>Rome</call><|im_end|>\n"
        "<|im_start|>tool\ndry<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>\nIt is dry.<|im_end|>\n"
    )
    whole = tokenizer.apply_chat_template(turns("Hi", "Ho"))["input_ids"]
    assert Renderer(tokenizer)(Conversation(turns("Hi", "Ho"))).tokens.tolist() == whole


def test_thinking_is_switched_by_a_variable() -> None:
    messages = turns("Hi", "Ho")
    messages[1]["reasoning_content"] = "Hm"
    assert "<think>Hm</think>" in text_of(rendered(*messages))
    assert "<think>" not in text_of(rendered(*messages, enable_thinking=False))


@pytest.mark.parametrize("name", ["enable_thinkin", "tokenize", "tools"])
def test_a_variable_that_the_template_does_not_have(name: str) -> None:
    with pytest.raises(QplugError, match=f"chat template has no variable '{name}'"):
        rendered(*turns("Hi"), **{name: True})


def test_without_a_template_it_is_one_line() -> None:
    with pytest.raises(QplugError, match="a conversation: the model's tokenizer has no chat temp"):
        rendered(*turns("Hi"), template=None)


def test_a_template_that_refuses() -> None:
    refusing = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(QplugError, match=r"a conversation: the chat template refuses it: .*Roles"):
        rendered(*turns("Hi"), template=refusing)


def test_texts_in_a_list_become_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    sample = rendered({"role": "user", "content": parts})
    assert text_of(sample) == "<|im_start|>user\none\ntwo<|im_end|>\n"


def test_arguments_of_a_tool_must_be_json() -> None:
    call = {"function": {"name": "look", "arguments": "{"}}
    with pytest.raises(QplugError, match="arguments of a tool call: not JSON"):
        rendered({"role": "assistant", "tool_calls": [call]})


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [True, False])
def test_answers_of_a_template_that_drops_thoughts(thinking: bool) -> None:
    """The first answer is written otherwise than when it was the last message."""
    messages = turns("Hi", "Ho", "He", "Hu")
    messages[1]["reasoning_content"] = messages[3]["reasoning_content"] = "Hm"
    sample = rendered(*messages, **({} if thinking else {"enable_thinking": False}))
    thought = "<think>Hm</think>\n" if thinking else ""
    assert answers_of(sample) == f"Ho<|im_end|>{thought}Hu<|im_end|>"


def test_answers_with_tools() -> None:
    assert answers_of(rendered(*WEATHER)) == (
        "<think>Look.</think>\n<call>Rome</call><|im_end|><think></think>\nIt is dry.<|im_end|>"
    )


def test_the_tag_of_a_template_says_what_the_answers_are() -> None:
    sample = rendered(*turns("Hi", "Ho", "He", "Hu"), template=GENERATION)
    assert answers_of(sample) == "Ho;Hu;"


def test_answers_that_cannot_be_found_are_refused() -> None:
    with pytest.raises(QplugError, match="a conversation: --mask prompts needs a chat template"):
        rendered(*turns("Hi", "Ho", "He"), template=BACKWARDS)


def test_a_conversation_without_an_answer_counts_nothing() -> None:
    sample = rendered(*turns("Hi"))
    assert not sample.counts
    assert text_of(sample) == "<|im_start|>user\nHi<|im_end|>\n"
