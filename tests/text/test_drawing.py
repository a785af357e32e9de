"""Samples of datasets of conversations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from chats import GENERATION, chat_tokenizer, turns

from qplug import Conversation, Dataset, NoParams, QplugError, Split
from qplug.text import first_windows
from qplug.text.conversations import Renderer, Sample
from qplug.text.drawing import draw

if TYPE_CHECKING:
    from torch import Tensor

RENDER = Renderer(chat_tokenizer(GENERATION), answers_only=True)


class Chats(Dataset[NoParams]):
    """Conversations that a test gives, each a question and an answer."""

    name = "chats"

    def __init__(self, *chats: tuple[str, str]) -> None:
        super().__init__(NoParams())
        self.chats = [Conversation(turns(*chat)) for chat in chats]

    def documents(self, split: Split) -> Iterator[Conversation]:
        return iter(self.chats)


CHATS = Chats(*((f"question {n}", f"answer {n}") for n in range(6)))
#: The tokens of one of them.
LENGTH = len("[user]question 0;[assistant]answer 0;")


def text_of(tokens: Tensor) -> str:
    return str(RENDER.tokenizer.decode(tokens))


def drawn(how: str, length: int, count: int, seed: int = 0) -> list[Sample]:
    return draw(CHATS, RENDER, how, length=length, count=count, seed=seed)


@pytest.mark.parametrize("how", ["dataset", "leading", "documents"])
def test_a_sample_is_one_conversation(how: str) -> None:
    samples = drawn(how, 100, 6)
    texts = [text_of(sample.tokens) for sample in samples]
    assert sorted(texts) == [f"[user]question {n};[assistant]answer {n};" for n in range(6)]
    assert texts != sorted(texts)
    assert [text_of(s.tokens) for s in drawn(how, 100, 6)] == texts
    assert [text_of(s.tokens) for s in drawn(how, 100, 6, seed=1)] != texts
    for sample in samples:
        assert sample.counted is not None
        assert int(sample.counted.sum()) == len("answer 0;")


def test_a_long_conversation_is_cut() -> None:
    assert {text_of(s.tokens)[:15] for s in drawn("leading", LENGTH - 3, 6)} == {"[user]question "}
    parts = drawn("documents", LENGTH - 3, 6)
    assert {len(s.tokens) for s in parts} == {LENGTH - 3}
    assert len({text_of(s.tokens)[:6] for s in parts}) > 1


def test_windows_that_hold_no_answer_are_left_out() -> None:
    with pytest.raises(QplugError, match="chats: 0 of 6 conversations have tokens to calibrate on"):
        drawn("dataset", len("[user]question 0;"), 2)


def test_packed_conversations() -> None:
    samples = drawn("packed", LENGTH + 5, 5)
    joined = text_of(samples[0].tokens) + text_of(samples[1].tokens)
    assert joined.count("[user]") >= 2
    assert {len(s.tokens) for s in samples} == {LENGTH + 5}
    with pytest.raises(QplugError, match=f"{6 * LENGTH} tokens to join, fewer than 6 windows of"):
        drawn("packed", LENGTH + 1, 6)


def test_windows_of_all_conversations() -> None:
    whole = "".join(f"[user]question {n};[assistant]answer {n};" for n in range(6))
    for sample in drawn("windows", 60, 9):
        assert text_of(sample.tokens) in whole
        assert sample.counted is not None
    with pytest.raises(QplugError, match="fewer than 1 windows of 1000"):
        drawn("windows", 1000, 1)


def test_perplexity_reads_rendered_conversations() -> None:
    windows = first_windows(CHATS, RENDER.tokenizer, length=LENGTH, count=2, split="evaluation")
    assert [text_of(w) for w in windows] == [
        f"[user]question {n};[assistant]answer {n};" for n in range(2)
    ]
