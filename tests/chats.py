"""Tokenizers with chat templates as models have them, and files of chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qplug.testing.models import tiny_tokenizer

#: As Qwen writes it: thoughts of earlier answers are dropped, tools come first.
CHATML = """\
{%- if tools %}<|im_start|>system
{{ tools | map(attribute='function') | map(attribute='name') | join(',') }}<|im_end|>
{% endif %}
{%- set last = namespace(user=-1) %}
{%- for m in messages if m.role == 'user' %}{% set last.user = messages.index(m) %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > last.user and enable_thinking is not false -%}
<think>{{ m.reasoning_content or '' }}</think>
{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}<call>{{ call.function.arguments.city }}</call>{% endfor -%}
<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

#: As models for training write it: with the tag that says what the model generates.
GENERATION = """\
{%- for m in messages %}[{{ m.role }}]
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }};{% endgeneration %}
{%- else %}{{ m.content }};{% endif %}{% endfor %}"""

#: A template that writes the last message first: no beginning is a beginning of the whole.
BACKWARDS = """\
{%- for m in messages | reverse %}{{ m.role }}:{{ m.content | upper }};{% endfor %}"""


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A token for each printable ASCII character and for both ends of a message."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents: str) -> list[dict[str, Any]]:
    """Messages of a user and an assistant, by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


WriteChats = Callable[..., Path]


@pytest.fixture
def write_chats(tmp_path: Path) -> WriteChats:
    """``write_chats(messages, ...)`` writes a file of conversations, or of other records."""

    def write(
        *records: Sequence[Mapping[str, Any]] | Mapping[str, Any], name: str = "chats.jsonl"
    ) -> Path:
        lines = [r if isinstance(r, Mapping) else {"messages": r} for r in records]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    return write
