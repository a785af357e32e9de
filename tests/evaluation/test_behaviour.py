"""The suite of behaviour: each check fails and passes, on texts, on stubs, and on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, chat_tokenizer
from click.testing import Result
from transformers import LlamaConfig, LlamaForCausalLM

from qplug.evaluation.behaviour.checks import _TYPES, loop, open_thoughts, wrong_call
from qplug.evaluation.behaviour.suite import LONGEST, Part, Speaker, Suite
from qplug.evaluation.end_tokens import end_tokens
from qplug.model.quiet import quiet_transformers
from qplug.testing.models import tiny_model

Cli = Callable[..., Result]

SUITE = Suite.shipped(tokens=200)
TOOLS = SUITE.prompts["tools"]

#: A template that opens the thoughts itself, as those of models that always think.
THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text", "problem"),
    [
        ("user: hi\n", "Hello.", None),
        ("user: hi\n<think>\n", "Well.</think>Hello.", None),
        ("user: hi\n", "<think>Well.</think>\n\nHello.", None),
        ("user: hi\n<think>\n", "Well, well, well", "no </think>"),
        ("user: hi\n", "<think>Well.</think>So <think>again", "no </think>"),
        ("user: hi\n<think>\n", "Well.</think>\n", "nothing behind </think>"),
    ],
)
def test_thoughts(prompt: str, text: str, problem: str | None) -> None:
    assert open_thoughts(prompt, text) == problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>', None),
        ('[{"name": "get_weather", "parameters": {"city": "{}", "unit": "celsius"}}]', None),
        ('{"type": "function", "function": {"name": "get_weather", "arguments": "{}"}}', "missing"),
        ('<think>{"name": 3</think>{"name": "get_weather", "arguments": {"city": "a"}}', None),
        ("It is warm in Rome.", "no call"),
        ('{"city": "Rome"}', "no call"),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}', "not JSON"),
        ("{'name': 'get_weather', 'arguments': {}}", "not JSON"),
        ('{"name": "get_wether", "arguments": {"city": "Rome"}}', "no tool is called 'get_wether'"),
        ('{"name": "get_weather", "arguments": {"city": "Rome", "when": "now"}}', "'when' is unk"),
        ('{"name": "get_weather", "arguments": {"city": 7}}', "'city' is no string"),
        (
            '{"name": "get_weather", "arguments": {"city": "a", "unit": "kelvin"}}',
            "none of celsius",
        ),
        ('{"name": "get_weather", "arguments": [1]}', "are no mapping"),
        ('{"name": "get_weather", "arguments": "{"}', "arguments are not JSON"),
        (
            '{"name": "add_to_calendar", "arguments": {"title": "a", "day": "b", "minutes": true}}',
            "'minutes' is no integer",
        ),
    ],
)
def test_calls(text: str, problem: str | None) -> None:
    found = wrong_call(text, TOOLS)
    assert found is None if problem is None else problem in (found or "")


def test_loops() -> None:
    assert loop(list(range(200))) is None
    assert loop([7] * 31) is None
    assert loop([7] * 32) == "the same 1 tokens again and again"
    assert loop([*range(50), *[1, 2, 3, 4, 5] * 7]) == "the same 5 tokens again and again"
    assert loop([*[1, 2, 3, 4, 5] * 7, 9]) is None
    assert loop([*range(99)] * 4) == "the same 99 tokens again and again"
    assert loop([]) is None


def test_the_schemas_have_no_keywords_that_are_not_checked() -> None:
    for tool in TOOLS:
        schema = tool["function"]["parameters"]
        assert set(schema) == {"type", "properties", "required"}
        for value in schema["properties"].values():
            assert set(value) <= {"type", "enum", "description"}
            assert value["type"] in _TYPES


# --- stubs ----------------------------------------------------------------------------------------


def speaker(answer: Callable[[str], str], template: str | None = THINKING) -> Speaker:
    """A model that answers prompts with ``answer``."""
    tokenizer = chat_tokenizer(template)

    def write(tokens: Sequence[int], count: int) -> list[int]:
        text = answer(str(tokenizer.decode(list(tokens))))
        written: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return written[:count]

    return Speaker(tokenizer, 4096, write)


def good(prompt: str) -> str:
    """An answer that passes each check."""
    for answer in SUITE.prompts["needle"]["answers"]:
        if answer in prompt:
            return f"I look.</think>{answer}"
    if "Lisbon" in prompt or "Reykjavik" in prompt:
        return 'I call.</think>{"name": "get_weather", "arguments": {"city": "Lisbon"}}'
    if "calendar" in prompt:
        call = {"title": "Budget", "day": "2026-04-17", "remind": True}
        return f'</think>{{"name": "add_to_calendar", "arguments": {json.dumps(call)}}}'
    return "I think.</think>The answer is short, and it ends."


def loops(prompt: str) -> str:
    return "again " * 100


def bad_json(prompt: str) -> str:
    return good(prompt).replace('"arguments": {', '"arguments": {,')


def counts(parts: Sequence[Part]) -> list[tuple[int, int]]:
    return [(part.passed, part.count) for part in parts]


def parts_of(model: Speaker) -> list[Part]:
    return list(SUITE.parts(model, lambda *_: None))


def test_a_model_that_does_all_right_passes_and_one_that_loops_fails() -> None:
    names = ["closes </think>", "valid tool calls", "no loop", "needle in 3896 tokens"]
    parts = parts_of(speaker(good))
    assert [part.name for part in parts] == names
    assert counts(parts) == [(6, 6), (4, 4), (6, 6), (3, 3)]
    parts = parts_of(speaker(loops))
    assert counts(parts) == [(0, 6), (0, 4), (0, 6), (0, 3)]
    assert parts[0].failures[0] == "answer 1: no </think>"
    assert parts[1].failures[3] == "answer 4: no call"
    assert parts[2].failures[0] == "answer 1: the same 6 tokens again and again"
    assert parts[3].failures[2] == "answer 3: not found at 90% of the text"


def test_bad_json_fails_in_the_part_of_tool_calls_alone() -> None:
    parts = parts_of(speaker(bad_json))
    assert counts(parts) == [(6, 6), (0, 4), (6, 6), (3, 3)]
    assert set(parts[1].failures) == {f"answer {n}: a call is not JSON" for n in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("template", "absent"),
    [
        (None, ["there is no chat template", "there is no chat template", None, None]),
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            ["the model does not think", "the chat template takes no tools", None, None],
        ),
        (THINKING + "{# <function=name> #}", [None, "the model writes calls in XML", None, None]),
    ],
)
def test_parts_that_do_not_apply_say_why(template: str | None, absent: list[str | None]) -> None:
    for part, why in zip(parts_of(speaker(good, template)), absent, strict=True):
        assert (why is None) == (part.absent is None)
        assert (why or "") in (part.absent or "")
        assert part.count == 0 or why is None


def test_the_needle_is_scaled_to_the_window_and_at_its_depth() -> None:
    asked: list[list[int]] = []
    stub = speaker(good)

    def write(tokens: Sequence[int], count: int) -> list[int]:
        asked.append(list(tokens))
        return stub.write(tokens, count)

    for window, length in ((2000, 1800), (40_000, LONGEST)):
        part = parts_of(Speaker(stub.tokenizer, window, write))[-1]
        assert part.name == f"needle in {length} tokens"
        assert part.passed == 3
        for tokens, depth in zip(asked[-3:], (0.1, 0.5, 0.9), strict=True):
            assert length - 150 < len(tokens) <= length
            text = stub.text(tokens)
            assert text.index("blue locker") / len(text) == pytest.approx(depth, abs=0.1)
    part = parts_of(Speaker(stub.tokenizer, 256, write))[-1]
    assert part.absent == "the model reads 256 tokens"


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_counts_base_and_quantized(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(source)
    with quiet_transformers():
        config = LlamaConfig(**{**tiny_model().config.to_dict(), "vocab_size": len(tokenizer)})
        LlamaForCausalLM(config).save_pretrained(source)
    out = tmp_path / "out"
    words = ("--scheme", "W8A16", "--group-size", -1, "--backend", "fake", "--device", "cpu")
    result = cli("quantize", source, "--out", out, *words)
    assert result.exit_code == 0, result.output
    asked = ("eval", out, "--behaviour", "--base", source, "--device", "cpu")
    result = cli(*asked, "--answer-tokens", 40)
    assert result.exit_code == 0, result.output
    head, *rows = [line.split("  ") for line in result.stdout.splitlines()]
    assert [cell.strip() for cell in head if cell] == ["part", "base", "quantized"]
    assert len(rows) == 4
    assert "valid tool calls: answer 1: " in result.stderr
    (told,) = [json.loads(cli(*asked, "--answer-tokens", 16, "--json").stdout)]
    assert [part["count"] for part in told["parts"]][:3] == [6, 4, 6]
    assert "--limit: is for another measure" in cli(*asked, "--limit", 3).stderr


def test_a_text_ends_where_generation_config_says(tmp_path: Path) -> None:
    tokenizer, model = chat_tokenizer(), tiny_model()
    known: set[Any] = end_tokens(tmp_path, model, tokenizer)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [98, 97]}')
    assert end_tokens(tmp_path, model, tokenizer) == known | {97, 98}
