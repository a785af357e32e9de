"""Tokenizers with chat templates as models have them, and files of chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qplug.model.quiet import quiet_transformers
from qplug.testing.models import tiny_model, tiny_tokenizer

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


# --- pictures -------------------------------------------------------------------------------------

#: As LLaVA writes it: content is a list of parts.
PARTS = """\
{%- for m in messages %}[{{ m.role }}]
{%- for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}
{%- endfor %};{% endfor %}"""


def write_small_llava(folder: Path) -> Path:
    """Writes a random LLaVA of two blocks, 64 wide, whose pictures are four tokens each."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = tiny_model().config.to_dict()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(**{**text, "vocab_size": len(tokenizer)}),
        image_token_index=len(tokenizer) - 1,
        image_seq_length=4,
    )
    side = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PARTS,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def write_picture(path: Path, color: tuple[int, int, int] = (200, 10, 10)) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), color).save(path)
    return path


def shown(path: str, question: str, answer: str) -> list[dict[str, Any]]:
    """A question on a picture and its answer."""
    content = [{"type": "image", "path": path}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
